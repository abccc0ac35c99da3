//! How the allocator of glibc treats buffers. Elsewhere there is nothing to set.
//!
//! * **From [`UNBACKED_FROM_BYTES`] on they are given straight from the kernel**, which backs only what is touched. Each loop of `fuser` allocates 16 MiB for a
//!   request of which it ever touches a page. glibc raises this bound to what was last freed, and then takes such buffers from its heap, where it must
//!   clear them: a hundred idle sessions took 1.6 GB. Setting the bound keeps it. Above any buffer of ours, so that those are not unmapped at every use.
//! * **Up to [`KEPT_BYTES`] that are free at the end of a heap stay the process's.** What a network brings is in buffers of up to half a MiB, which
//!   come and go thousands of times a second; given back at once, as is usual from 128 KiB on, each is cleared by the kernel before the next has it.
//! * **There are at most [`HEAPS`] heaps**, so that this has a bound: without it there are eight for each core, and threads that block for a moment have them all in use.

#[cfg(target_env = "gnu")]
const UNBACKED_FROM_BYTES: libc::c_int = 8 << 20;

#[cfg(target_env = "gnu")]
const KEPT_BYTES: libc::c_int = 8 << 20;

#[cfg(target_env = "gnu")]
const HEAPS: libc::c_int = 8;

/// Sets it up, the first time. Where an option is refused the log says so, and the allocator goes on as usual.
pub fn set_up() {
    #[cfg(target_env = "gnu")]
    {
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(|| {
            let options = [
                (libc::M_MMAP_THRESHOLD, UNBACKED_FROM_BYTES, "idle sessions may take 16 MiB each"),
                (libc::M_TRIM_THRESHOLD, KEPT_BYTES, "ingests take more of the processor"),
                (libc::M_ARENA_MAX, HEAPS, "memory that is free may stay in use"),
            ];
            for (option, value, otherwise) in options {
                // SAFETY: sets an option of the allocator, under its own lock.
                if unsafe { libc::mallopt(option, value) } == 0 {
                    tracing::warn!(option, "the allocator keeps its own bound; {otherwise}");
                }
            }
        });
    }
}
