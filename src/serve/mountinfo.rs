//! The kernel's list of mounts, `/proc/.../mountinfo`. Not read in the path of an attachment: it is as long as there are mounts.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::mount_calls::Device;

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MountLine {
    /// Number of the mount.
    pub(super) mount_id: u64,
    /// The file system on it.
    pub(super) device: Device,
    /// Where it is, as seen from the reader's root.
    pub(super) target: PathBuf,
    /// Type, with the subtype.
    pub(super) kind: String,
    /// What it says it is mounted from.
    pub(super) source: String,
}

/// The mounts in `text`, in order of mounting; lines that cannot be read are left out.
pub(super) fn parse(text: &[u8]) -> Vec<MountLine> {
    text.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

/// `36 35 98:0 /root /mount options [optional ...] - type source superoptions`
fn parse_line(line: &[u8]) -> Option<MountLine> {
    let mut fields = line.split(|byte| *byte == b' ');
    let mount_id = text(fields.next()?)?.parse().ok()?;
    let device = fields.nth(1).and_then(text)?;
    let (major, minor) = device.split_once(':')?;
    let target = PathBuf::from(OsString::from_vec(unescape(fields.nth(1)?)));
    let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
    Some(MountLine {
        mount_id,
        device: Device { major: major.parse().ok()?, minor: minor.parse().ok()? },
        target,
        kind: text(fields.next()?)?.to_owned(),
        source: String::from_utf8_lossy(&unescape(fields.next()?)).into_owned(),
    })
}

fn text(field: &[u8]) -> Option<&str> {
    std::str::from_utf8(field).ok()
}

/// Space, tab, newline and backslash are written as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, after)) = rest.split_first() {
        let escaped = (byte == b'\\')
            .then(|| after.get(..3).and_then(text).and_then(|digits| u8::from_str_radix(digits, 8).ok()))
            .flatten();
        plain.push(escaped.unwrap_or(byte));
        rest = if escaped.is_some() { &after[3..] } else { after };
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_with_and_without_optional_fields() {
        let text = br"27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
36 27 0:57 / /run/a\040b rw shared:7 master:2 - fuse.ckptd ckptd ro,user_id=0
junk
";
        let lines = parse(text);
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0].kind, "ext4");
        assert_eq!(
            lines[1],
            MountLine {
                mount_id: 36,
                device: Device { major: 0, minor: 57 },
                target: "/run/a b".into(),
                kind: "fuse.ckptd".into(),
                source: "ckptd".into(),
            }
        );
    }

    #[test]
    fn what_is_not_an_escape_stays() {
        assert_eq!(unescape(br"a\134b\9x\01"), br"a\b\9x\01");
    }
}
