//! A small generated model, for those who have none at hand.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use crate::error::{Error, Result};

/// Tensors of the model.
const TENSORS: usize = 8;

/// Bytes of each.
const TENSOR_BYTES: usize = 16 << 20;

/// Writes `model.safetensors` and `config.json` into a new directory.
pub(super) fn generate(directory: &Path) -> Result<()> {
    std::fs::create_dir_all(directory).map_err(|error| Error::io("creating", directory, error))?;
    let weights = directory.join("model.safetensors");
    write_weights(&weights).map_err(|error| Error::io("writing", &weights, error))?;
    let config = directory.join("config.json");
    std::fs::write(&config, "{\"model_type\": \"generated\"}\n").map_err(|error| Error::io("writing", &config, error))
}

fn write_weights(path: &Path) -> std::io::Result<()> {
    let tensors: Vec<String> = (0..TENSORS)
        .map(|at| {
            let (from, to) = (at * TENSOR_BYTES, (at + 1) * TENSOR_BYTES);
            format!(
                r#""layers.{at}.weight":{{"dtype":"BF16","shape":[{}],"data_offsets":[{from},{to}]}}"#,
                TENSOR_BYTES / 2
            )
        })
        .collect();
    let mut header = format!("{{{}}}", tensors.join(","));
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    // xorshift64: bytes that neither repeat nor compress.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..TENSORS * TENSOR_BYTES / 8 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.write_all(&state.to_le_bytes())?;
    }
    out.flush()
}
