//! A group of processes for which the kernel has little memory.

use std::fs;
use std::path::PathBuf;

use nix::unistd::Pid;

/// Little enough that a daemon that does anything comes to its end.
const LIMIT_BYTES: u64 = 512 << 10;

/// A control group of its own, version 1 or 2; removed when dropped.
pub(crate) struct ShortOfMemory {
    at: PathBuf,
    is_v1: bool,
}

impl ShortOfMemory {
    pub(crate) fn new() -> Self {
        let name = format!("ckptd-test-{}", std::process::id());
        let roots = [("/sys/fs/cgroup/memory", true), ("/sys/fs/cgroup", false)];
        let (root, is_v1) = roots
            .into_iter()
            .find(|(root, is_v1)| {
                fs::exists(format!("{root}/{}", if *is_v1 { "tasks" } else { "cgroup.procs" })).unwrap()
            })
            .expect("a hierarchy of control groups with memory");
        let at = PathBuf::from(root).join(name);
        fs::create_dir(&at).unwrap();
        let group = Self { at, is_v1 };
        group.write(if is_v1 { "memory.limit_in_bytes" } else { "memory.max" }, LIMIT_BYTES);
        // Where there is swap; none of it.
        let _ = fs::write(group.at.join(if is_v1 { "memory.swappiness" } else { "memory.swap.max" }), "0");
        group
    }

    /// Puts a process there; what it had before stays charged where it was under version 1.
    pub(crate) fn take(&self, process: Pid) {
        self.write("cgroup.procs", process.as_raw());
    }

    /// How many processes of it the kernel has killed for want of memory.
    pub(crate) fn killed(&self) -> u64 {
        let file = if self.is_v1 { "memory.oom_control" } else { "memory.events" };
        let text = fs::read_to_string(self.at.join(file)).unwrap();
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.expect("the kernel counts its kills").parse().unwrap()
    }

    fn write(&self, file: &str, value: impl ToString) {
        fs::write(self.at.join(file), value.to_string()).unwrap();
    }
}

impl Drop for ShortOfMemory {
    fn drop(&mut self) {
        // Those that were not killed, where a test has failed: a group with processes stays.
        let left = fs::read_to_string(self.at.join("cgroup.procs")).unwrap_or_default();
        let out = self.at.with_file_name("cgroup.procs");
        left.lines().for_each(|process| _ = fs::write(&out, process));
        let _ = fs::remove_dir(&self.at);
    }
}
