//! What holds for all formats together; hostile headers are in `hostile`.
#![expect(clippy::cast_possible_truncation, reason = "sizes of samples are a few MiB")]

use std::collections::HashSet;

use proptest::prelude::*;

use super::samples::{self, Named, STORED, Style, TORCH, chunks, chunks_in_windows, noise};
use super::*;
use crate::digest::Digest;
use crate::limits;

fn layout(bytes: &[u8]) -> Layout {
    let layout = Layout::read(&bytes, bytes.len() as u64);
    assert_covers(&layout, bytes.len() as u64);
    layout
}

fn assert_covers(layout: &Layout, size: u64) {
    let end = layout.regions().iter().fold(0, |at, region| {
        assert!(region.start == at && region.len > 0, "{region:?} at {at}");
        at + region.len
    });
    assert_eq!((end, layout.size()), (size, size));
}

fn assert_tiles(chunks: &[Chunk], bytes: &[u8]) {
    let end = chunks.iter().fold(0, |at, chunk| {
        assert!(chunk.offset == at && (1..=limits::CHUNK_MAX_BYTES).contains(&chunk.len), "{chunk:?} at {at}");
        let end = at + chunk.len;
        assert_eq!(chunk.digest, Digest::of(&bytes[at as usize..end as usize]));
        end
    });
    assert_eq!(end, bytes.len() as u64);
}

fn every_format() -> Vec<(Format, Vec<u8>)> {
    let model = samples::model();
    let npz: Vec<Named> = model.iter().map(|(name, bytes)| (format!("{name}.npy"), samples::npy(bytes))).collect();
    vec![
        (Format::Safetensors, samples::safetensors(&model, "")),
        (Format::Gguf, samples::gguf(&model, 64)),
        (Format::Zip, samples::torch(&model)),
        (Format::Zip, samples::zip(&npz, STORED)),
        (Format::Npy, samples::npy(&model[4].1)),
        (Format::Opaque, noise(77, 9_000_000)),
    ]
}

fn digests(bytes: &[u8]) -> HashSet<Digest> {
    chunks(bytes).iter().map(|chunk| chunk.digest).collect()
}

/// Whether the chunks of `tensor`, cut as a region of its own, are all among `chunks`.
fn has_tensor(chunks: &HashSet<Digest>, tensor: &[u8]) -> bool {
    let size = tensor.len() as u64;
    let alone = Layout::cover(Format::Opaque, size, vec![Region { start: 0, len: size, cut: Cut::Steps }]).unwrap();
    chunks_in_windows(tensor, alone, &[1 << 20]).iter().all(|chunk| chunks.contains(&chunk.digest))
}

fn large(model: &[Named]) -> impl Iterator<Item = &[u8]> {
    model.iter().map(|(_, bytes)| bytes.as_slice()).filter(|bytes| bytes.len() as u64 >= REGION_MIN_BYTES)
}

#[test]
fn each_format_is_told_by_its_content_and_tiled() {
    for (format, bytes) in every_format() {
        assert_eq!(layout(&bytes).format(), format);
        assert_tiles(&chunks(&bytes), &bytes);
    }
}

#[test]
fn every_large_tensor_meets_its_equal_in_every_other_format() {
    let model = samples::model();
    for (format, bytes) in every_format().into_iter().take(4) {
        let chunks = digests(&bytes);
        for tensor in large(&model) {
            // GGUF pads to its alignment: the last step of an odd-sized tensor is longer there.
            let sound = tensor.len() % 64 == 0 || format != Format::Gguf;
            assert_eq!(has_tensor(&chunks, tensor), sound, "{format:?}, tensor of {}", tensor.len());
        }
    }
}

#[test]
fn a_longer_header_costs_the_header_alone() {
    let model = samples::model();
    let (short, long) = (samples::safetensors(&model, ""), samples::safetensors(&model, &"x".repeat(40)));
    let known = digests(&short);
    let new: Vec<_> = chunks(&long).into_iter().filter(|chunk| !known.contains(&chunk.digest)).collect();
    assert_eq!(new.len(), 1, "{new:?}");
    assert_eq!(new[0].offset, 0);
    assert_eq!(new[0].len, layout(&long).regions()[0].len);
}

#[test]
fn a_changed_tensor_costs_its_changed_steps_alone() {
    let mut model = samples::model();
    let known = digests(&samples::safetensors(&model, ""));
    model[4].1[5 << 20] ^= 1;
    let new: Vec<_> =
        chunks(&samples::safetensors(&model, "")).into_iter().filter(|chunk| !known.contains(&chunk.digest)).collect();
    assert_eq!(new.iter().map(|chunk| chunk.len).collect::<Vec<_>>(), [4 << 20]);
}

#[test]
fn opaque_bytes_meet_again_behind_an_insertion() {
    let bytes = noise(5, 12 << 20);
    let mut longer = bytes.clone();
    longer.splice(1000..1000, noise(6, 40));
    let known = digests(&bytes);
    let chunks = chunks(&longer);
    let new: u64 = chunks.iter().filter(|chunk| !known.contains(&chunk.digest)).map(|chunk| chunk.len).sum();
    assert!(new <= 4 << 20, "{new} bytes are new");
}

#[test]
fn an_archive_shares_with_what_was_packed() {
    let model = samples::model();
    let files = vec![
        ("readme".to_owned(), b"hello".to_vec()),
        ("model.safetensors".to_owned(), samples::safetensors(&model, "")),
        ("model.gguf".to_owned(), samples::gguf(&model, 32)),
        ("pytorch_model.bin".to_owned(), samples::torch(&model)),
        ("vocabulary".to_owned(), noise(8, 3 << 20)),
    ];
    let archive = digests(&samples::zip(&files, STORED));
    for (name, bytes) in files.iter().skip(1) {
        assert!(digests(bytes).is_subset(&archive), "{name}");
    }
}

#[test]
fn packed_members_are_regions_of_content() {
    let members = vec![("archive/data/0".to_owned(), noise(1, 1 << 20)), ("b".to_owned(), noise(2, 1 << 20))];
    for style in [Style { method: 8, ..STORED }, Style { flags: 1, ..TORCH }] {
        let layout = layout(&samples::zip(&members, style));
        assert_eq!(layout.format(), Format::Zip);
        assert_eq!(layout.regions().len(), 5);
        assert!(layout.regions().iter().all(|region| region.cut == Cut::Content));
    }
}

#[test]
fn a_tail_too_short_for_the_table_is_evened_out() {
    let len = (8 << 20) + 100;
    let region = vec![Region { start: 0, len, cut: Cut::Steps }];
    let bytes = noise(3, len as usize);
    let chunks = chunks_in_windows(&bytes, Layout::cover(Format::Opaque, len, region).unwrap(), &[1 << 20]);
    assert_tiles(&chunks, &bytes);
    let lens: Vec<_> = chunks.iter().map(|chunk| chunk.len).collect();
    assert_eq!(lens, [4 << 20, 2 << 20, (2 << 20) + 100]);
}

#[test]
fn files_of_another_length_than_laid_out_are_tiled_all_the_same() {
    let bytes = samples::safetensors(&samples::small_model(), "");
    for size in [0, 1, 300_000, bytes.len() as u64 + 5_000_000] {
        let mut padded = bytes.clone();
        padded.resize(padded.len().max(size as usize), 0);
        let pushed = if size < bytes.len() as u64 { &bytes } else { &padded };
        let layout = Layout::opaque(size);
        assert_tiles(&chunks_in_windows(pushed, layout, &[100_000]), pushed);
        let short = Layout::read(&bytes, bytes.len() as u64);
        assert_tiles(&chunks_in_windows(&padded[..size as usize], short, &[100_000]), &padded[..size as usize]);
    }
}

#[test]
fn cuts_and_digests_are_those_of_version_2() {
    let found: Vec<String> = every_format().iter().map(|(format, bytes)| describe(*format, bytes)).collect();
    assert_eq!(CHUNKING_VERSION, 2);
    assert_eq!(found.join("\n"), GOLDEN.trim());
}

/// Format, lengths of the chunks, digest over their digests.
fn describe(format: Format, bytes: &[u8]) -> String {
    let chunks = chunks(bytes);
    let lens: Vec<String> = chunks.iter().map(|chunk| chunk.len.to_string()).collect();
    let all: Vec<u8> = chunks.iter().flat_map(|chunk| *chunk.digest.as_bytes()).collect();
    format!("{format:?} {} {}", lens.join(","), &Digest::of(&all).to_hex()[..32])
}

const GOLDEN: &str = "
Safetensors 857,307200,2048,262144,100,4194304,4194304,1048576,40000,700001,61440,2097152,2101248 be53dfd8acc5b9c8671acb485649e1b0
Gguf 768,307200,2048,262144,128,4194304,4194304,1048576,40000,700032,61440,2097152,2101248 45769b075c8b217acbf090abe0a016c7
Zip 3136,307200,2176,262144,256,4194304,4194304,1048576,40128,700001,61663,2097152,2101248,1338 11cf6277fd3cae56698784f259d33a6b
Zip 53,128,307200,2282,128,262144,334,128,4194304,4194304,1048576,40234,128,700001,61855,128,2097152,2101248,709 f9202d16c585a84255a2d2e001c4a597
Npy 128,4194304,4194304,1048576 5cc0c15d8f8eaa2eef806dd6a4996d66
Opaque 396720,1693625,345103,1154653,1296259,1281801,976151,1152927,702761 5d9a830f24a7036d3e601d9030a95c04
";

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn windows_do_not_change_the_chunks(
        which in 0_usize..6,
        windows in prop::collection::vec(prop_oneof![1_usize..100, 1_usize..5_000_000], 1..6),
    ) {
        let (_, bytes) = every_format().swap_remove(which);
        prop_assume!(windows.iter().sum::<usize>() / windows.len() > 500);
        prop_assert_eq!(chunks_in_windows(&bytes, layout(&bytes), &windows), chunks(&bytes));
    }

    #[test]
    fn any_regions_are_covered_and_tiled(pieces in prop::collection::vec((0_u64..6_000_000, 0_u64..6_000_000, any::<bool>()), 0..5)) {
        let size = 7_000_000;
        let mut at = 0;
        let mut regions = Vec::new();
        for (gap, len, steps) in pieces {
            let start = at + gap;
            if start + len <= size {
                regions.push(Region { start, len, cut: if steps { Cut::Steps } else { Cut::Content } });
                at = start + len;
            }
        }
        let layout = Layout::cover(Format::Zip, size, regions).unwrap();
        assert_covers(&layout, size);
        let bytes = noise(at, size as usize);
        let chunks = chunks_in_windows(&bytes, layout, &[1 << 20]);
        assert_tiles(&chunks, &bytes);
    }
}
