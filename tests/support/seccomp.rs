//! A program that finds a system call missing, as older kernels and filters of containers and services make it.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use nix::libc;

/// All calls that make mounts by descriptor.
pub(crate) const MOUNTS_BY_DESCRIPTOR: [libc::c_long; 6] = [
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_move_mount,
    libc::SYS_open_tree,
    libc::SYS_mount_setattr,
];

/// Makes `calls` fail with ENOSYS in `command` and whatever it runs.
pub(crate) fn refuse(command: &mut Command, calls: &[libc::c_long]) {
    let load = u16::try_from(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS).unwrap();
    let compare = u16::try_from(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K).unwrap();
    let answer = u16::try_from(libc::BPF_RET | libc::BPF_K).unwrap();
    let refusal = libc::SECCOMP_RET_ERRNO | u32::try_from(libc::ENOSYS).unwrap();
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    // The call's number is the first word of `struct seccomp_data`.
    let mut steps = vec![step(load, 0, 0, 0)];
    for call in calls {
        steps.push(step(compare, 0, 1, u32::try_from(*call).unwrap()));
        steps.push(step(answer, 0, 0, refusal));
    }
    steps.push(step(answer, 0, 0, libc::SECCOMP_RET_ALLOW));
    let length = u16::try_from(steps.len()).unwrap();
    let install = move || {
        let program = libc::sock_fprog { len: length, filter: steps.as_mut_ptr() };
        // SAFETY: the filter outlives the call, which copies it.
        let refused = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
                || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) != 0
        };
        if refused { Err(std::io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: only async-signal-safe calls between fork and exec.
    unsafe { command.pre_exec(install) };
}
