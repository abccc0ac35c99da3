//! A manifest indexed for walking: children of a directory by name, in O(log n).
//!
//! Node 0 is the root and node `i + 1` is entry `i` of the manifest, so inode = node + 1 and both are fixed by
//! the manifest alone. The index is two flat arrays, 12 bytes an entry.

use std::sync::Arc;

use super::{Entry, EntryKind, Manifest};

/// Node of the root.
pub const ROOT: u32 = 0;

/// An immutable, shareable index over one manifest.
#[derive(Clone, Debug)]
pub struct Tree {
    manifest: Arc<Manifest>,
    parent: Box<[u32]>,
    /// Children of node `n` are `children[first[n]..first[n + 1]]`, sorted by name.
    first: Box<[u32]>,
    children: Box<[u32]>,
}

impl Tree {
    /// Indexes `manifest`; O(n).
    pub fn new(manifest: Arc<Manifest>) -> Self {
        let nodes = manifest.entries().len() + 1;
        let parent = parents(&manifest);
        let mut first = vec![0_u32; nodes + 1];
        for &above in &parent[1..] {
            first[above as usize + 1] += 1;
        }
        for node in 0..nodes {
            first[node + 1] += first[node];
        }
        let mut next = first.clone();
        let mut children = vec![0_u32; nodes - 1];
        for (node, &above) in (0_u32..).zip(&parent).skip(1) {
            let slot = &mut next[above as usize];
            children[*slot as usize] = node;
            *slot += 1;
        }
        Self { manifest, parent: parent.into(), first: first.into(), children: children.into() }
    }

    /// The manifest behind the index.
    pub fn manifest(&self) -> &Arc<Manifest> {
        &self.manifest
    }

    /// Number of nodes, the root included.
    pub fn len(&self) -> u32 {
        u32::try_from(self.parent.len()).unwrap_or(u32::MAX)
    }

    /// Never: the root is always there.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The entry of a node; `None` for the root and for nodes that do not exist.
    pub fn entry(&self, node: u32) -> Option<&Entry> {
        self.manifest.entries().get((node as usize).checked_sub(1)?)
    }

    /// Whether the node is there and a directory.
    pub fn is_directory(&self, node: u32) -> bool {
        node == ROOT || self.entry(node).is_some_and(|entry| entry.kind == EntryKind::Directory)
    }

    /// The directory above; the root is above itself.
    pub fn parent(&self, node: u32) -> u32 {
        self.parent.get(node as usize).copied().unwrap_or(ROOT)
    }

    /// Children sorted by name; empty for what is not a directory.
    pub fn children(&self, node: u32) -> &[u32] {
        let node = node as usize;
        match (self.first.get(node), self.first.get(node + 1)) {
            (Some(&from), Some(&to)) => &self.children[from as usize..to as usize],
            _ => &[],
        }
    }

    /// Last path component of a node; empty for the root.
    pub fn name(&self, node: u32) -> &[u8] {
        self.entry(node).map_or(&[], |entry| entry.path.file_name())
    }

    /// The child of directory `node` called `name`.
    pub fn lookup(&self, node: u32, name: &[u8]) -> Option<u32> {
        let children = self.children(node);
        children.binary_search_by(|child| self.name(*child).cmp(name)).ok().map(|at| children[at])
    }

    /// Number of directories directly below: what a directory's link count shows.
    pub fn subdirectories(&self, node: u32) -> u32 {
        let count = self.children(node).iter().filter(|child| self.is_directory(**child)).count();
        u32::try_from(count).unwrap_or(u32::MAX)
    }
}

/// Canonical order puts a directory right before what is below it, so a stack finds every parent.
fn parents(manifest: &Manifest) -> Vec<u32> {
    let mut parent = vec![ROOT];
    let mut open: Vec<(u32, usize)> = Vec::new();
    for (node, entry) in (1_u32..).zip(manifest.entries()) {
        let depth = entry.path.components().count();
        while open.last().is_some_and(|(_, at)| *at >= depth) {
            open.pop();
        }
        parent.push(open.last().map_or(ROOT, |(above, _)| *above));
        if entry.kind == EntryKind::Directory {
            open.push((node, depth));
        }
    }
    parent
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;
    use crate::names::EntryPath;

    #[test]
    fn walking_finds_every_entry_under_its_parent() {
        let paths = ["a/b/c", "a/b.x", "a-", "z/y", "a/b/d", "a.b"];
        let entries = paths
            .iter()
            .map(|path| Entry {
                path: EntryPath::new(path.as_bytes()).unwrap(),
                kind: EntryKind::File { size: 0, executable: false, digest: Digest::of(b"") },
            })
            .collect();
        let tree = Tree::new(Arc::new(Manifest::new(entries).unwrap()));
        for path in paths {
            let mut node = ROOT;
            for part in path.split('/') {
                let child = tree.lookup(node, part.as_bytes()).unwrap();
                assert_eq!(tree.parent(child), node);
                node = child;
            }
            assert_eq!(tree.entry(node).unwrap().path.to_string(), path);
        }
        assert_eq!(tree.lookup(ROOT, b"b"), None);
        let names: Vec<_> = tree.children(ROOT).iter().map(|child| tree.name(*child).to_vec()).collect();
        assert_eq!(names, [b"a".to_vec(), b"a-".to_vec(), b"a.b".to_vec(), b"z".to_vec()]);
        assert_eq!(tree.subdirectories(ROOT), 2);
    }
}
