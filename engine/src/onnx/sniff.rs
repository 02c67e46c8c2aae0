//! What a file is that is not a model, by its first bytes.

/// The kind of file, with an article; `None` if it could be a model.
pub(super) fn looks_like(head: &[u8]) -> Option<&'static str> {
    const MAGIC: &[(usize, &[u8], &str)] = &[
        (0, b"\xff\xd8\xff", "a JPEG image"),
        (0, b"\x89PNG", "a PNG image"),
        (0, b"GIF8", "a GIF image"),
        (8, b"WEBP", "a WebP image"),
        (8, b"WAVE", "a WAV recording"),
        (0, b"%PDF", "a PDF document"),
        (0, b"PK\x03\x04", "a ZIP archive (a PyTorch checkpoint is one; export it to ONNX)"),
        (0, b"\x1f\x8b", "gzip-compressed data"),
        (0, b"\x28\xb5\x2f\xfd", "zstd-compressed data"),
        (0, b"\xfd7zXZ", "xz-compressed data"),
        (0, b"BZh", "bzip2-compressed data"),
        (4, b"TFL3", "a TensorFlow Lite model"),
        (4, b"ORTM", "a model in onnxruntime's own format; the .onnx file it was made from is wanted"),
        (0, b"GGUF", "a GGUF model"),
        (8, b"{\"", "a safetensors file"),
        (0, b"\x89HDF", "an HDF5 file"),
        (0, b"\x93NUMPY", "a NumPy array"),
        (0, b"\0asm", "a WebAssembly module"),
        (0, b"\x80\x02", "a Python pickle (an old PyTorch checkpoint is one; export it to ONNX)"),
        (0, b"version https://git-lfs", "a Git LFS pointer: the model itself was not downloaded"),
    ];
    let at = |offset: usize| head.get(offset..).unwrap_or_default();
    if let Some((_, _, what)) = MAGIC.iter().find(|(offset, magic, _)| at(*offset).starts_with(magic)) {
        return Some(what);
    }
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    match text.first() {
        _ if head.len() < 4 || !head.iter().all(|b| matches!(b, b'\t' | b'\n' | b'\r' | b' '..=b'~' | 0x80..)) => None,
        Some(b'<') => Some("an HTML or XML page, perhaps the error page of a server"),
        Some(b'{' | b'[') => Some("JSON text"),
        _ => Some("text"),
    }
}

#[cfg(test)]
mod tests {
    use super::looks_like;

    #[test]
    fn kinds() {
        assert_eq!(looks_like(b"\xff\xd8\xff\xe0\0\x10JFIF"), Some("a JPEG image"));
        assert!(looks_like(b"<!doctype html>\n<html>").unwrap().contains("HTML"));
        assert_eq!(looks_like(b"Not Found\n"), Some("text"));
        assert_eq!(looks_like(b"\x08\x07\x12\x07pytorch"), None);
        assert_eq!(looks_like(b""), None);
    }
}
