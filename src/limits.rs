//! Every bound of the daemon, in one place, each with its reason.
//!
//! A bound that operators may change is a *default* here and a key in the configuration; the rest are fixed because
//! formats, the kernel or the catalog depend on them.

/// Fill unit: piece of a blob that is fetched, made durable and resumed as one. 4 MiB keeps the unit map of a
/// 500 GB file at 15 KiB and is a good HTTP range.
pub const UNIT_BYTES: u64 = 4 << 20;

/// Largest chunk. Equal to a fill unit, so that sealing never holds more than one unit's worth undecided.
pub const CHUNK_MAX_BYTES: u64 = 4 << 20;

/// Shortest piece that is entered in the chunk table: below it a hole saves less than its rows cost.
pub const CHUNK_MIN_RECORDED_BYTES: u64 = 64 << 10;

/// Shortest run worth borrowing: shorter holes fragment a file's reads for little space.
pub const BORROW_MIN_BYTES: u64 = 256 << 10;

/// Structure of one checkpoint file that is read to place cuts (JSON header, GGUF header, zip directory). It is
/// streamed, so this bounds time, and memory only for one string of that length. Real ones stay below 20 MiB.
pub const LAYOUT_HEADER_BYTES: u64 = 32 << 20;

/// All that is read of one file at a look to place cuts: an archive may hold many files with headers of their own. A second or
/// two of parsing at most.
pub const LAYOUT_READ_BYTES: u64 = 256 << 20;

/// Tensors or members of one file: what fits in a header of that size with names of usual length.
pub const LAYOUT_PIECES: usize = 1 << 18;

/// Granularity of holes and shared extents on the filesystems we run on.
pub const DISK_BLOCK_BYTES: u64 = 4096;

/// Linux `NAME_MAX`: a longer component could not be shown on the mount.
pub const ENTRY_NAME_BYTES: usize = 255;

/// Linux `PATH_MAX` less the NUL.
pub const ENTRY_PATH_BYTES: usize = 4095;

/// Nesting of directories; real trees stay below 30.
pub const ENTRY_DEPTH: usize = 128;

/// Length of ids of checkpoints and jobs: they become file names.
pub const ID_BYTES: usize = 128;

/// Length of names and owners.
pub const LABEL_BYTES: usize = 255;

/// Entries of one checkpoint: twice the largest public dataset-like repositories.
pub const CHECKPOINT_ENTRIES: usize = 2_000_000;

/// Logical bytes of one checkpoint, as the platform promises (500 GB, decimal).
pub const CHECKPOINT_BYTES_DEFAULT: u64 = 500_000_000_000;

/// Encoded manifest: 2,000,000 entries of 200 bytes.
pub const MANIFEST_BYTES: usize = 512 << 20;

/// Bytes that fetchers may hold in memory.
pub const MEMORY_BUDGET_DEFAULT: u64 = 256 << 20;

/// Memory that one entry takes while it is brought in, names of usual length included: seen are 550 bytes where entries come one after the other,
/// and up to 1,160 where all are listed at first and once more at the end. Those of all trees together are never more than twice the budget.
pub const ENTRY_MEMORY_BYTES: u64 = 1024;

/// Files fetched at a time from one source.
pub const FETCHES_PER_SOURCE: usize = 8;

/// Streams from sources that all ingests together have open: several ranges of several files.
pub const STREAMS: usize = FETCHES_PER_SOURCE * 4;

/// Files that are followed while they fill, of all ingests together: each takes a thread, of which tokio has 512 for all blocking work, and waits in it for
/// its source.
pub const SEALERS: usize = 256;

/// Requests for what readers wait for, of all ingests together: sources that are silent may have those of thirty-two before others wait. Each has
/// some hundred KiB of the connection's buffers at most before its memory is claimed.
pub const STREAMS_FOR_READERS: usize = FETCHES_PER_SOURCE * 32;

/// Listings of one datastore, of one process or of one captured path at a time: what a server that does not answer can hold up in threads, which are gone until it does.
pub const LISTINGS_PER_DATASTORE: usize = 4;

/// Listings at a time for all captures through processes, and as many for all by path: an eighth of the runtime's 512 threads that may block.
pub const LISTINGS_OF_CAPTURES: usize = 64;

/// Ingests that move bytes at the same time; more wait their turn.
pub const INGESTS_AT_A_TIME: usize = 8;

/// Uploads that move bytes at the same time, apart from other ingests, since a sender may be slow or silent for long. Each
/// holds up to 25 MiB (a body, a queue, a file in memory), so together they stay near the memory budget.
pub const SENDERS_AT_A_TIME: usize = 16;

/// Uploads whose senders are gone and may come back: half of those at a time, so that the rest have their turn.
pub const UPLOADS_LEFT: usize = SENDERS_AT_A_TIME / 2;

/// Files published in one transaction.
pub const PUBLISH_BATCH_FILES: usize = 512;

/// From this many files in a batch one `syncfs` is cheaper than an `fdatasync` each.
pub const SYNCFS_FROM_FILES: usize = 16;

/// Commands waiting for a catalog or publisher thread; senders wait beyond.
pub const QUEUE_COMMANDS: usize = 256;

/// Links of a tree, or files of a flight, that one step of a removal takes: a few tens of milliseconds on the catalog's and the publisher's
/// thread, between which everybody else has a turn.
pub const REMOVAL_STEP: usize = 512;

/// Chunks that one such step forgets: a blob of hundreds of gigabytes has hundreds of thousands.
pub const REMOVAL_STEP_CHUNKS: usize = 8192;

/// Blobs unlinked before their names are made durably gone together, which takes up to 256 syncs; a crash has so many to unlink again.
pub const REMOVAL_UNSYNCED: usize = 4096;

/// Removals, evictions and forgotten flights whose bytes are being given back; more wait before they begin.
pub const REMOVALS_UNDER_WAY: usize = 256;

/// Blobs that one step of a walk through all of them looks at: some milliseconds.
pub const SWEEP_STEP: usize = 8192;

/// Bytes a second that scrubbing reads by itself: a terabyte in nine hours, and a hundredth of what one core digests.
pub const SCRUB_RATE_DEFAULT: u64 = 32 << 20;

/// Blob descriptors kept open by the daemon for its own reads.
pub const OPEN_BLOBS: usize = 1024;

/// Read-ahead of the store's disk: what one page fault or read brings in. Reads through the page cache gain up to 4 MiB and
/// no more beyond.
pub const READ_AHEAD_DEFAULT: u64 = 4 << 20;

/// Space that admission leaves free on the store's filesystem, so that the catalog can always commit.
pub const DISK_RESERVE_BYTES: u64 = 64 << 20;

/// Space that is left free whatever was admitted. What lies between it and the reserve is for the catalog and its log, which grow while what was
/// admitted comes: it must not fail for that.
pub const DISK_KEPT_BYTES: u64 = DISK_RESERVE_BYTES / 2;

/// Looks at a tree that somebody still writes to, from the first on, before it is refused: 16 s of pauses in all. A job that has ended
/// flushes in less, and one that goes on writing will not stop for us.
pub const LOOKS_AT_A_CHANGING_TREE: u32 = 7;

/// Names of what changed that an error lists, of however many.
pub const CHANGED_NAMES_SHOWN: usize = 10;

/// One gRPC message, either way.
pub const MESSAGE_BYTES: usize = 16 << 20;

/// Connections of the HTTP listener; more wait to be accepted.
pub const HTTP_CONNECTIONS: usize = 512;

/// Orders of reading, rates and estimates kept, of each; older ones are dropped. An order is at most 32 KiB.
pub const FORECASTS_KEPT: u64 = 256;

/// Steps of one order of reading: 16 GiB of fill units, beyond which going in file order is as good.
pub const READ_ORDER_STEPS: usize = 4096;

/// Least that a checkpoint of unknown size is charged to its owner's quota ahead of what has arrived: a transaction for each MiB is
/// cheap beside fetching it.
pub const QUOTA_STEP_MIN_BYTES: u64 = 1 << 20;

/// Most of it: what one such checkpoint may keep from another of the same owner for want of knowing better.
pub const QUOTA_STEP_MAX_BYTES: u64 = 64 << 20;

/// Message of a gRPC status, longer ones are cut: statuses are headers, in which some three bytes may stand for one, and clients take 16 KiB of them.
pub const STATUS_MESSAGE_BYTES: usize = 1536;

/// One fact of a gRPC status, for the same reason.
pub const STATUS_FACT_BYTES: usize = 1024;

/// Events kept; older ones are dropped.
pub const EVENTS_KEPT: u64 = 10_000;

/// Checkpoints in one attachment.
pub const CHECKPOINTS_PER_JOB: usize = 64;

/// Bytes out for one byte in above which an archive is a bomb, once it has given [`ARCHIVE_RATIO_FROM_BYTES`]. Nothing
/// that is worth keeping compresses so well throughout.
pub const ARCHIVE_RATIO: u64 = 1000;

/// What an archive may give before its ratio is looked at: one tensor of zeros is no bomb.
pub const ARCHIVE_RATIO_FROM_BYTES: u64 = 1 << 30;

/// Memory that the dictionary of a compressed archive may claim: what `xz -9` (65 MiB) and `zstd --ultra -22` (128 MiB) need.
pub const ARCHIVE_DICTIONARY_BYTES: u64 = 128 << 20;

/// One extended header of a tar (long names, attributes, maps of sparse files).
pub const ARCHIVE_HEADER_BYTES: u64 = 8 << 20;

/// Pieces of one sparse file in a tar: 4 MiB of map.
pub const ARCHIVE_SPARSE_PIECES: usize = 1 << 18;

/// Bytes of names and link targets remembered of one archive: what its manifest could hold anyway.
pub const ARCHIVE_NAMES_BYTES: usize = MANIFEST_BYTES;

/// Submodules of one git checkpoint, all levels together: each is a connection of its own.
pub const GIT_SUBMODULES: usize = 256;

/// Levels of submodules below a repository. Real ones have two or three; a repository that contains itself ends here.
pub const GIT_SUBMODULE_DEPTH: usize = 8;

/// `.gitmodules` or `.lfsconfig` of a repository: some kilobytes in real ones.
pub const GIT_SETTINGS_BYTES: u64 = 1 << 20;

/// Memory that one `git` may take: it holds a delta and its base whole, and servers send files above 512 MiB without deltas.
pub const GIT_MEMORY_BYTES: u64 = 2 << 30;

/// Longest pointer that git LFS recognises.
pub const LFS_POINTER_BYTES: u64 = 1024;

/// Calls that one scheduler or operator may have under way: each of its jobs may wait in an attach.
pub const CALLS_OF_A_SCHEDULER: usize = 1024;

/// Calls a second of one scheduler: a bound for one gone wild, far above a busy one.
pub const CALLS_PER_SECOND_OF_A_SCHEDULER: f64 = 10_000.0;

/// Calls that one tenant or reader may have under way: some watches and uploads.
pub const CALLS_OF_A_TENANT: usize = 64;

/// Calls a second of one tenant or reader.
pub const CALLS_PER_SECOND_OF_A_TENANT: f64 = 50.0;

/// Connections by TCP, those in their handshake included; more wait to be accepted.
pub const TCP_CONNECTIONS: usize = 1024;
