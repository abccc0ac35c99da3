//! What a process of a job may do with files, and threads of ours that may do no more.
//!
//! A thread that looks at what a job shows us takes over user, group and groups that the process acts on files with, and of our capabilities
//! it keeps those alone that the process has as well. So the kernel answers it as it would answer the process: what is mounted or linked where
//! is the job's to choose, and nothing is read through us that it could not read by itself. What was opened so stays open to everybody.
//!
//! Such a thread is made for one piece of work and ends with it. Nobody takes rights off again, so none can be left on a thread that goes on to
//! other work, whatever becomes of the piece. (User and groups belong to a thread, as far as the kernel is concerned; it is the C library that changes
//! them for all threads, and so it is not asked.) Where the process may do all that we may, no thread is made.
//!
//! Capabilities count for root alone, and only in our user namespace. A process that has them in one of its own, as root of a rootless container
//! has, is held to its user and groups as the host numbers them: it is refused what it might have read there by capability (files that
//! another user of that namespace has closed to it), and never given more than it has. A program that is set-user-ID or set-group-ID acts
//! with rights that are not its caller's, so such a process is refused; one that has become another in every respect (as `sudo` does) cannot be told
//! from one that always was. What a security module, Landlock or seccomp denies the process beyond that is not asked for here.
//!
//! The kernel makes a process undumpable when one of its threads takes other rights: from then on there is no core dump of the daemon.

use std::fs;
use std::thread;

use nix::errno::Errno;

use crate::error::{Error, NOT_PERMITTED, Result};

/// The rights of the thread that reads it.
const OURS: &str = "/proc/thread-self/status";

/// Version 3 of the layout in which capabilities are set, two words of 32 each (capset(2)).
const CAPABILITY_LAYOUT: u32 = 0x2008_0522;

/// The user that capabilities are looked at for.
const ROOT: u32 = 0;

/// What the kernel compares with a file's owner and mode.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Identity {
    user: u32,
    group: u32,
    groups: Vec<u32>,
    /// Effective ones, a bit each.
    capabilities: u64,
}

/// The rights over files of one process.
#[derive(Debug)]
pub(super) struct Rights {
    pid: u32,
    identity: Identity,
    /// Whether they are no less than ours.
    are_ours: bool,
}

impl Rights {
    /// Those of process `pid`, whose `/proc/<pid>/status` is `status`; `our_namespace` says that its user namespace is ours.
    ///
    /// # Errors
    /// `NOT_PERMITTED` for a set-user-ID or set-group-ID program.
    pub(super) fn of_status(pid: u32, status: &[u8], our_namespace: bool) -> Result<Self> {
        let ours = fs::read(OURS).map_err(|error| Error::io("reading", OURS, error))?;
        let (ours, theirs) = (Identity::of(std::process::id(), &ours)?, Identity::of(pid, status)?);
        let count = our_namespace && theirs.user == ROOT;
        let capabilities = if count { ours.capabilities & theirs.capabilities } else { 0 };
        let identity = Identity { capabilities, ..theirs };
        Ok(Self { pid, are_ours: identity == ours, identity })
    }

    /// What `work` gives, done with these rights; blocks.
    ///
    /// # Errors
    /// Those of `work`, `NOT_PERMITTED` saying whose rights it is for; `RIGHTS_REFUSED` where we may not take them over.
    pub(super) fn act<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        if self.are_ours {
            return work();
        }
        let thread = thread::Builder::new().name("ckptd-as-job".to_owned());
        thread::scope(|scope| {
            let acting = thread.spawn_scoped(scope, || {
                self.identity.put_on().map_err(|errno| self.refused(errno))?;
                work().map_err(|error| self.explained(error))
            });
            let acting = acting.map_err(|error| {
                let message = format!("no thread could be started that reads for process {}", self.pid);
                Error::no_space("TOO_MANY_THREADS", message)
                    .remedy("retry later, or raise TasksMax of ckptd's unit")
                    .because(error)
            })?;
            acting.join().unwrap_or_else(|_| Err(Error::internal("a thread that reads for a job has panicked")))
        })
    }

    fn explained(&self, error: Error) -> Error {
        if error.reason() != NOT_PERMITTED {
            return error;
        }
        let (pid, user) = (self.pid, self.identity.user);
        error.during(format!("process {pid} (user {user} of this host) may not do this itself")).remedy(
            "let the job make it readable for that user, capture it through a process that may read it, or by its path on the host",
        )
    }

    fn refused(&self, errno: Errno) -> Error {
        Error::denied("RIGHTS_REFUSED", format!("taking over the rights of process {}", self.pid))
            .remedy("run ckptd as root with CAP_SETUID and CAP_SETGID")
            .because(errno)
    }
}

impl Identity {
    /// # Errors
    /// `NOT_PERMITTED` where it is not one and the same.
    fn of(pid: u32, status: &[u8]) -> Result<Self> {
        // The name in it, which is the process's to choose, has its line breaks escaped.
        let status = String::from_utf8_lossy(status);
        let unknown = || Error::internal("the kernel does not say what a process may do");
        // Real, effective, saved, and what counts for files.
        let (user, group) = (ids(&status, "Uid:"), ids(&status, "Gid:"));
        let (user, group) = (user.ok_or_else(unknown)?, group.ok_or_else(unknown)?);
        let ([real, .., user], [real_group, .., group]) = (user.as_slice(), group.as_slice()) else {
            return Err(unknown());
        };
        if (real, real_group) != (user, group) {
            let message = format!("process {pid} runs a program with the rights of another (set-user-ID)");
            return Err(Error::denied(NOT_PERMITTED, message).remedy("capture through another process of the job"));
        }
        let groups = ids(&status, "Groups:").ok_or_else(unknown)?;
        let capabilities = field(&status, "CapEff:").and_then(|text| u64::from_str_radix(text.trim(), 16).ok());
        Ok(Self { user: *user, group: *group, groups, capabilities: capabilities.ok_or_else(unknown)? })
    }

    /// Makes them the calling thread's, for good.
    fn put_on(&self) -> nix::Result<()> {
        // SAFETY: the kernel reads as many ids as the vector, which outlives the call, has.
        Errno::result(unsafe { libc::syscall(libc::SYS_setgroups, self.groups.len(), self.groups.as_ptr()) })?;
        set_id(libc::SYS_setfsgid, self.group)?;
        set_id(libc::SYS_setfsuid, self.user)?;
        let word = |shift: u32| u32::try_from((self.capabilities >> shift) & u64::from(u32::MAX)).unwrap_or(0);
        // Effective, permitted, inheritable: the lower half of each, then the upper.
        let words = [0, 32].map(|shift| [word(shift), word(shift), 0_u32]);
        // The thread that calls is 0.
        let header = [CAPABILITY_LAYOUT, 0_u32];
        // SAFETY: both arrays have the layout that the version stands for and outlive the call.
        Errno::result(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), words.as_ptr()) }).map(drop)
    }
}

/// Sets a user or group for files, with a call that answers with the one before and never with an error.
fn set_id(call: libc::c_long, id: u32) -> nix::Result<()> {
    // SAFETY: the call takes a number and touches no memory of ours.
    let set = || unsafe { libc::syscall(call, id) };
    set();
    if set() == libc::c_long::from(id) { Ok(()) } else { Err(Errno::EPERM) }
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name))
}

fn ids(status: &str, name: &str) -> Option<Vec<u32>> {
    field(status, name)?.split_ascii_whitespace().map(|id| id.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, chown};
    use std::panic;

    use super::*;
    use crate::error::Kind;

    /// DAC_OVERRIDE and DAC_READ_SEARCH.
    const ANY_FILE: u64 = 0b110;

    fn status(users: &str, groups: &str, capabilities: u64) -> Vec<u8> {
        format!(
            "Name:\tx\\nUid:\t0\t0\t0\t0\nUid:\t{users}\nGid:\t7\t7\t7\t7\nGroups:\t{groups} \nCapEff:\t{capabilities:016x}\n"
        )
        .into_bytes()
    }

    #[test]
    fn capabilities_count_for_root_of_our_user_namespace_alone() {
        let ours = Identity::of(1, &fs::read(OURS).unwrap()).unwrap().capabilities;
        for (users, our_namespace, kept) in [
            ("0 0 0 0", true, ours & ANY_FILE),
            ("0 0 0 0", false, 0),
            ("1000 1000 1000 1000", true, 0),
            ("1000 0 0 1000", true, 0),
        ] {
            let rights = Rights::of_status(7, &status(users, "7 8", ANY_FILE), our_namespace).unwrap();
            let Identity { user, group, groups, capabilities } = rights.identity;
            assert_eq!(
                (user.to_string().as_str(), capabilities),
                (&users[users.len() - user.to_string().len()..], kept)
            );
            assert_eq!((group, groups), (7, vec![7, 8]));
            assert!(!rights.are_ours);
        }
    }

    #[test]
    fn a_program_with_the_rights_of_another_is_refused_and_so_is_what_says_nothing() {
        let error = Rights::of_status(7, &status("1000 0 0 0", "", u64::MAX), true).unwrap_err();
        assert_eq!((error.kind(), error.reason()), (Kind::Denied, NOT_PERMITTED));
        for silent in ["", "Uid:\t0\nGid:\t0\nGroups:\t\nCapEff:\t0\n", "Uid:\t0 0 0 0\nGid:\t0 0 0 0\nCapEff:\t0\n"] {
            assert_eq!(Rights::of_status(7, silent.as_bytes(), true).unwrap_err().kind(), Kind::Internal, "{silent}");
        }
    }

    #[test]
    fn the_kernel_answers_as_it_would_answer_the_process_and_us_as_before() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("file");
        fs::write(&path, "x").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let read = || fs::read(&path).map_err(|error| Error::io("reading", &path, error));
        // Owner and group of the file; who reads, and whether he may.
        for (owner, users, groups, capabilities, may) in [
            ((0, 0), "1000 1000 1000 1000", "", u64::MAX, false),
            ((1000, 0), "1000 1000 1000 1000", "", 0, true),
            ((0, 8), "1000 1000 1000 1000", "5 8", 0, true),
            ((0, 7), "1000 1000 1000 1000", "", 0, true),
            ((1000, 1000), "0 0 0 0", "", 0, false),
            ((1000, 1000), "0 0 0 0", "", ANY_FILE, true),
        ] {
            chown(&path, Some(owner.0), Some(owner.1)).unwrap();
            let rights = Rights::of_status(7, &status(users, groups, capabilities), true).unwrap();
            let found = rights.act(read);
            assert_eq!(found.is_ok(), may, "{owner:?} {users} {groups} {capabilities} {found:?}");
            if let Err(error) = found {
                assert_eq!((error.kind(), error.reason()), (Kind::Denied, NOT_PERMITTED));
                assert!(error.to_string().contains("process 7"), "{error}");
            }
            let ended = rights.act::<()>(|| panic::resume_unwind(Box::new("it ends")));
            assert_eq!(ended.unwrap_err().kind(), Kind::Internal);
            read().unwrap();
        }
    }
}
