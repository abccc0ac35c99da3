//! Which file system a path of a process lies on, by the kernel's list of its mounts: that is known without asking the file system.
//!
//! The list knows nothing of links; where one in the path leads to another mount, the answer is that of the path as it is written.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// One line of the list.
struct Mount<'a> {
    id: u32,
    parent: u32,
    target: Cow<'a, [u8]>,
    kind: &'a [u8],
}

/// The type, with its subtype, of the file system that the absolute `path` lies on by the list `mounts` (`/proc/<pid>/mountinfo`).
/// `None` where the list does not tell, as in a root that is no mount.
pub(super) fn kind_at<'a>(mounts: &'a [u8], path: &Path) -> Option<Cow<'a, str>> {
    let mounts: Vec<_> = mounts.split(|byte| *byte == b'\n').filter_map(parse).collect();
    let listed: BTreeSet<_> = mounts.iter().map(|mount| mount.id).collect();
    let is_above = |mount: &&Mount<'_>| path.starts_with(OsStr::from_bytes(&mount.target));
    let above: Vec<_> = mounts.iter().filter(is_above).collect();
    let length = |mount: &&&Mount<'_>| mount.target.len();
    let mut found = above.iter().filter(|mount| !listed.contains(&mount.parent)).min_by_key(length)?;
    // As the path goes: what is mounted on the way hides what was mounted further down before. No line is met twice but in circles.
    for _ in &above {
        let Some(next) = above.iter().filter(|mount| mount.parent == found.id).min_by_key(length) else { break };
        found = next;
    }
    Some(String::from_utf8_lossy(found.kind))
}

/// Whether it is one whose answers a program of somebody's gives.
pub(super) fn is_fuse(kind: &str) -> bool {
    matches!(kind, "fuse" | "fuseblk") || kind.starts_with("fuse.") || kind.starts_with("fuseblk.")
}

/// `36 35 98:0 /root /mount options [optional ...] - type source superoptions`
fn parse(line: &[u8]) -> Option<Mount<'_>> {
    let mut fields = line.split(|byte| *byte == b' ');
    let mut number = || std::str::from_utf8(fields.next()?).ok()?.parse().ok();
    let (id, parent) = (number()?, number()?);
    let target = unescape(fields.nth(2)?);
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
    Some(Mount { id, parent, target, kind })
}

/// Space, tab, newline and backslash are written as three octal digits.
fn unescape(field: &[u8]) -> Cow<'_, [u8]> {
    if !field.contains(&b'\\') {
        return Cow::Borrowed(field);
    }
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let digits =
            if byte == b'\\' { after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok()) } else { None };
        let escaped = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        plain.push(escaped.unwrap_or(byte));
        rest = if escaped.is_some() { &after[3..] } else { after };
    }
    Cow::Owned(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = r"20 1 254:0 / / rw - ext4 /dev/vda rw
21 20 0:5 / /proc rw - proc proc rw
30 20 0:30 / /opt/ml rw shared:7 master:2 - fuse.evil evil rw
31 30 0:31 / /opt/ml/output rw - tmpfs disk rw
32 20 0:32 / /mnt/a\040b rw - fuse x rw
33 32 0:33 / /mnt/a\040b rw - xfs /dev/vdb rw
40 20 0:40 / /srv/job/data rw - fuse.hidden x rw
41 20 0:41 / /srv/job rw - tmpfs above rw
junk
";

    #[test]
    fn the_last_mount_on_the_way_counts() {
        for (path, kind) in [
            ("/", "ext4"),
            ("/opt", "ext4"),
            ("/opt/mlx", "ext4"),
            ("/opt/ml", "fuse.evil"),
            ("/opt/ml/other", "fuse.evil"),
            ("/opt/ml/output", "tmpfs"),
            ("/opt/ml//output/x/", "tmpfs"),
            ("/mnt/a b/c", "xfs"),
            ("/srv/job/data", "tmpfs"),
        ] {
            assert_eq!(kind_at(MOUNTS.as_bytes(), Path::new(path)).as_deref(), Some(kind), "{path}");
        }
    }

    #[test]
    fn a_root_that_is_no_mount_is_told_only_what_is_mounted_in_it() {
        let mounts = b"50 49 0:50 / /opt/ml rw - fuse x rw\n51 50 0:51 / /opt/ml/output rw - xfs /dev/vdb rw\n";
        assert_eq!(kind_at(mounts, Path::new("/opt")), None);
        assert_eq!(kind_at(mounts, Path::new("/opt/ml/x")).as_deref(), Some("fuse"));
        assert_eq!(kind_at(mounts, Path::new("/opt/ml/output")).as_deref(), Some("xfs"));
        // Nor does one whose lines lead in circles keep us.
        let circle = b"1 9 0:1 / / rw - a x rw\n2 1 0:2 / / rw - b x rw\n2 2 0:3 / / rw - c x rw\n";
        assert!(kind_at(circle, Path::new("/opt")).is_some());
    }

    #[test]
    fn fuse_is_known_by_its_types() {
        for (kind, fuse) in
            [("fuse", true), ("fuse.sshfs", true), ("fuseblk", true), ("fusectl", false), ("ext4", false)]
        {
            assert_eq!(is_fuse(kind), fuse, "{kind}");
        }
    }
}
