// The engine of check_downstream.sh that runs on a GPU through a cudarc of its own choice.
use quantkv::raw::bindings::{QUANTKV_ABI_VERSION, quantkv_cache_write};

fn main() {
    let op = quantkv_cache_write::default();
    println!("C ABI {QUANTKV_ABI_VERSION}, {} tokens to write", op.num_tokens);
}
