//! TLS hellos.

/// A hello that asks for this name.
pub fn hello(name: &str) -> Vec<u8> {
    let long = |bytes: &[u8]| [&(bytes.len() as u16).to_be_bytes()[..], bytes].concat();
    let list = long(&[&[0][..], &long(name.as_bytes())].concat());
    let extensions = [&[0, 0][..], &long(&list)].concat();
    let tail = [&[0, 0, 2, 0x13, 1, 1, 0][..], &long(&extensions)].concat();
    let body = [&[3, 3][..], &[7; 32], &tail].concat();
    let message = [&[1, 0][..], &long(&body)].concat();
    [&[22, 3, 1][..], &long(&message)].concat()
}
