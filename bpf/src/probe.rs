//! What the running kernel offers, in words for people.

use std::fs;
use std::path::Path;

use libbpf_rs::PrintLevel;

/// libbpf's version.
pub fn libbpf_version() -> String {
    // SAFETY: takes nothing and returns a pointer to a static string (libbpf.h).
    let text = unsafe { std::ffi::CStr::from_ptr(libbpf_rs::libbpf_sys::libbpf_version_string()) };
    text.to_string_lossy().into_owned()
}

/// One line for each thing that matters to the data path.
pub fn probe() -> Vec<String> {
    let read = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned());
    let kernel = read("/proc/sys/kernel/osrelease").unwrap_or_else(|error| format!("unknown ({error})"));
    let btf = if Path::new("/sys/kernel/btf/vmlinux").exists() {
        "present"
    } else {
        "missing: offload needs it"
    };
    let unprivileged =
        read("/proc/sys/kernel/unprivileged_bpf_disabled").unwrap_or_else(|_| "unknown".into());
    let opened = crate::Cgroup::enter().and_then(|cgroup| {
        let bpf = crate::Bpf::open(&cgroup)?;
        Ok(crate::selftest::run(&bpf))
    });
    let offload = match opened {
        Ok(Ok(took)) => format!(
            "programs load, self-test passed in {} ms: sessions are forwarded in the kernel",
            took.as_millis()
        ),
        Ok(Err(error)) => format!("not trusted: {error:#}"),
        Err(error) => format!("not to be had: {error:#}"),
    };
    vec![
        format!("kernel {kernel}"),
        format!("kernel type information (BTF) {btf}"),
        format!("unprivileged_bpf_disabled {unprivileged}"),
        format!("offload {offload}"),
    ]
}

/// Sends libbpf's own messages to the log: what explains a failure (the verifier's words) at debug level.
pub(crate) fn log_libbpf_at_debug() {
    fn print(_level: PrintLevel, text: String) {
        log::debug!("{}", text.trim_end());
    }
    libbpf_rs::set_print(Some((PrintLevel::Info, print)));
}
