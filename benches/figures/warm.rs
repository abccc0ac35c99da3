//! Memory in the same state for both sides of a comparison.
//!
//! Where a hypervisor gives memory when it is first touched, and takes back what was free for a few seconds, whoever touches it first pays two seconds a
//! GiB: as much as everything else that is measured together. Which side that is was chance. So memory is touched before either begins.

use memmap2::MmapMut;

/// Bytes touched beforehand, besides those that are to be written.
const SPARE_BYTES: usize = 1 << 30;

/// Touches as much memory as writing `bytes` takes, and frees it.
pub(crate) fn warm(bytes: usize) {
    let mut memory = MmapMut::map_anon(bytes + SPARE_BYTES).unwrap();
    memory.chunks_mut(4096).for_each(|page| page[0] = 1);
}
