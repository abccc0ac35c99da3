//! Serving: a checkpoint as a read-only file system that any number of jobs see.
//!
//! ```text
//! content.rs     what is asked of the store
//! view.rs        the tree as inodes             refusal.rs     why not, and the errno
//! open_files.rs  what the kernel has open       backing.rs     files given to the kernel
//! fuse.rs        requests -> view -> answers    buffers.rs     memory for answers
//! attachments.rs jobs, their rights and views   gates.rs    one at a time per job, per checkpoint
//! stored.rs      the store as content           placed.rs      a datastore as content
//! partial.rs     a flight as content            readers.rs     threads that may be held up
//! read_order.rs  what was read first           waits.rs       reads that wait, and who waits for them
//! features.rs    what the kernel offers         handshake.rs   fuser on a connection of ours
//! session.rs     one connection, one mount      mount_calls.rs the kernel's mount calls
//! target.rs      where views may go             attach.rs      putting views there and taking them away
//! namespace.rs   acting inside another mount namespace
//! keeping.rs     what outlives the daemon      ledger.rs    what a successor must know of a session
//! mountinfo.rs   the kernel's list of mounts    sessions.rs    the sessions directory, stale mounts
//! strays.rs      files read by the kernel that no session tells of
//! ```
//!
//! **One session per served checkpoint; jobs get bind mounts of it.** Attaching is then a mount operation and no state of a
//! job is in the path of reads. **Nothing is ever invalidated**: content is immutable, inodes follow from the manifest,
//! so the kernel may keep everything and a session holds no state that a restart loses, save which files are open
//! and how ([`open_files`]). **Whole files are the kernel's to read** where it can (passthrough): all jobs share one
//! copy in the page cache and reads do not reach the daemon. **No thread that answers the kernel waits** on network, SQLite, or a
//! lock of unknown length. **Only what is ours is unmounted**, known by mount and device number, and never on the way out.

pub mod attach;
pub mod attachments;
pub mod buffers;
pub mod content;
pub mod features;
pub mod keeping;
pub mod open_files;
pub mod read_order;
pub mod refusal;
pub mod session;
pub mod sessions;
pub mod view;

mod backing;
mod fuse;
mod gates;
mod handshake;
mod ledger;
mod mount_calls;
mod mountinfo;
mod namespace;
mod partial;
mod placed;
mod readers;
mod stored;
mod strays;
mod target;
mod waits;

pub use attach::{Detached, Mounted, NamedView, Place, Prepared, Views, detach, prepare, standing};
pub use buffers::ReadBuffers;
pub use content::{Content, FileNode, FileState, OpenFile, Resume};
pub use features::{Features, probe};
pub use keeping::{HandedOver, Keeper, Keeping, Orphan, Outlive};
pub use mount_calls::Device;
pub use session::{Original, Session, SessionConfig, Stopped};
pub use sessions::{prepare_sessions_dir, release_sessions_dir, stale_mounts, unmount_stale, unmount_stale_but};
pub use target::Reserved;
