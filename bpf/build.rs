//! Compiles `c/*.bpf.c` with clang and generates their skeletons into `OUT_DIR`.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use libbpf_cargo::SkeletonBuilder;

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for name in ["slot", "entry", "accept"] {
        let source = format!("c/{name}.bpf.c");
        SkeletonBuilder::new()
            .source(&source)
            .clang_args(clang_args())
            .build_and_generate(out.join(format!("{name}.skel.rs")))
            .unwrap_or_else(|error| {
                panic!("failed to compile {source}: {error:#}; are clang and linux-libc-dev installed?")
            });
    }
    println!("cargo::rerun-if-changed=c");
}

/// Version 3 of the instruction set (Linux 5.12) has the atomic operations that the programs use. Debian
/// keeps `asm/` under the multiarch directory, which clang does not search for the BPF target.
fn clang_args() -> Vec<OsString> {
    let arch = env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    let multiarch = format!("/usr/include/{arch}-linux-gnu");
    let mut args: Vec<OsString> = vec!["-Wall".into(), "-Werror".into(), "-mcpu=v3".into()];
    if Path::new(&multiarch).is_dir() {
        args.push("-idirafter".into());
        args.push(multiarch.into());
    }
    args
}
