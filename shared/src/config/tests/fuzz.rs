//! Configurations that [`culvert_fuzz`] makes.

use super::*;

/// What is included would be this machine's.
fn harmless(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for at in 0..bytes.len() {
        if bytes[at..].starts_with(b"include") {
            bytes[at] = b'I';
        }
    }
    bytes
}

#[test]
fn fuzz_any_file_is_loaded_or_refused_with_its_places() {
    let path = Path::new("/nonexistent/a.toml");
    let world = Fake::default();
    let read = |bytes: &[u8]| read_in(&world, |reader| reader.bytes(path, bytes), path, &[]);
    let mut loaded = 0;
    let mut check = |bytes: &[u8]| {
        let lines = bytes.iter().filter(|byte| **byte == b'\n').count() + 1;
        match read(bytes) {
            Ok(config) => {
                loaded += 1;
                let text = dump(&config);
                assert_eq!(read(text.as_bytes()), Ok(config), "{text}");
            }
            Err(errors) => {
                assert!(!errors.is_empty());
                for error in errors {
                    let line = error.to_string();
                    assert!(!line.chars().any(char::is_control), "{line:?}");
                    if let Place::File { line, column, .. } = error.place {
                        assert!(line >= 1 && line <= lines && column >= 1, "{error}");
                    }
                }
            }
        }
    };
    culvert_fuzz::run("config", 5_000, |bytes, cut| {
        let bytes = harmless(bytes);
        if cut != bytes.len() {
            check(&bytes[..cut]);
        }
        check(&bytes);
    });
    assert!(loaded > 1_000, "only {loaded} are right");
}
