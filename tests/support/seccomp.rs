//! A program that finds a system call missing, as older kernels and filters of containers and services make it.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use nix::libc;

/// Makes `call` fail with ENOSYS in `command` and whatever it runs.
pub(crate) fn refuse(command: &mut Command, call: libc::c_long) {
    let load = u16::try_from(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS).unwrap();
    let compare = u16::try_from(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K).unwrap();
    let answer = u16::try_from(libc::BPF_RET | libc::BPF_K).unwrap();
    let refusal = libc::SECCOMP_RET_ERRNO | u32::try_from(libc::ENOSYS).unwrap();
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let mut steps = [
        // The call's number is the first word of `struct seccomp_data`.
        step(load, 0, 0, 0),
        step(compare, 0, 1, u32::try_from(call).unwrap()),
        step(answer, 0, 0, refusal),
        step(answer, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let install = move || {
        let program = libc::sock_fprog { len: 4, filter: steps.as_mut_ptr() };
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
