//! External data as it streams in: each byte goes straight to the tensor that wants it, so that a file is never held
//! beside its tensors.

use weblane_engine::onnx::Model;
use weblane_engine::storage::AlignedBytes;
use weblane_engine::{Error, ErrorCode, Result};

/// One tensor's stretch of a file.
struct Piece {
    location: String,
    offset: u64,
    length: u64,
    /// What has arrived of it.
    bytes: AlignedBytes,
}

/// A model and the parts of other files that it waits for.
pub(crate) struct Externals {
    model: Model,
    pieces: Vec<Piece>,
    /// Location and bytes seen so far of each file.
    files: Vec<(String, u64)>,
}

impl Externals {
    /// Lists what the model wants.
    pub(crate) fn new(model: Model) -> Self {
        let pieces: Vec<_> = model
            .external()
            .map(|r| Piece {
                location: r.location.to_owned(),
                offset: r.offset,
                length: r.length,
                bytes: AlignedBytes::new(),
            })
            .collect();
        let mut files: Vec<(String, u64)> = Vec::new();
        for piece in &pieces {
            if !files.iter().any(|(location, _)| *location == piece.location) {
                files.push((piece.location.clone(), 0));
            }
        }
        Externals { model, pieces, files }
    }

    /// The files, in the order in which the model first names them.
    pub(crate) fn locations(&self) -> Vec<String> {
        self.files.iter().map(|(location, _)| location.clone()).collect()
    }

    /// The model, without what it waits for.
    pub(crate) fn model(&self) -> &Model {
        &self.model
    }

    /// The next bytes of a file.
    pub(crate) fn push(&mut self, location: &str, chunk: &[u8]) -> Result<()> {
        let Some((_, seen)) = self.files.iter_mut().find(|(l, _)| l == location) else {
            let message = format!("the model names no file \"{location}\"");
            return Err(Error::new(ErrorCode::ExternalData, message));
        };
        let start = *seen;
        let end = start + chunk.len() as u64;
        *seen = end;
        for piece in self.pieces.iter_mut().filter(|p| p.location == location) {
            let from = piece.offset.max(start);
            let to = piece.offset.saturating_add(piece.length).min(end);
            if from >= to {
                continue;
            }
            if piece.bytes.is_empty() {
                let length = usize::try_from(piece.length)
                    .map_err(|_| Error::out_of_memory(format!("a tensor of {} bytes", piece.length)))?;
                piece.bytes.reserve_exact(length)?;
            }
            // Both ends are within the chunk, whose length is a usize.
            piece.bytes.extend_from_slice(&chunk[(from - start) as usize..(to - start) as usize])?;
        }
        Ok(())
    }

    /// The model with all its elements.
    ///
    /// # Errors
    /// `ExternalData` when a file ended before a tensor's last byte.
    pub(crate) fn resolve(self) -> Result<Model> {
        let Externals { mut model, mut pieces, files } = self;
        model.resolve_external(|location, offset, length| {
            // Tensors may share a stretch; each has a piece of its own.
            let at = pieces.iter().position(|p| p.location == location && p.offset == offset && p.length == length);
            let piece = at.map(|at| pieces.swap_remove(at));
            let piece = piece.ok_or_else(|| Error::internal("external data that was not announced"))?;
            if piece.bytes.len() as u64 != length {
                let seen = files.iter().find(|(l, _)| l == location).map_or(0, |(_, seen)| *seen);
                return Err(Error::new(
                    ErrorCode::ExternalData,
                    format!(
                        "a tensor is in bytes {offset} to {} of \"{location}\", which has only {seen}",
                        offset.saturating_add(length)
                    ),
                ));
            }
            Ok(piece.bytes)
        })?;
        Ok(model)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use weblane_engine::DType;
    use weblane_engine::onnx::{ExternalData, TensorData, TensorProto};

    /// Three tensors in `a` (two of them share bytes) and one in `b`.
    fn model() -> Model {
        let tensor = |location: &str, offset: u64, length: usize| TensorProto {
            name: format!("{location}{offset}"),
            dtype: DType::U8,
            dims: vec![length],
            data: TensorData::External(ExternalData {
                location: location.to_owned(),
                offset,
                length: length as u64,
                checksum: None,
            }),
        };
        let mut model = Model::default();
        model.graph.initializers = vec![tensor("a", 10, 5), tensor("b", 0, 3), tensor("a", 0, 4), tensor("a", 10, 5)];
        model
    }

    fn bytes(tensor: &TensorProto) -> &[u8] {
        match &tensor.data {
            TensorData::Bytes(b) => b.as_ref(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn every_cut_of_a_file_gives_the_same_tensors() {
        let file: Vec<u8> = (0..20).collect();
        for size in 1..=20 {
            let mut externals = Externals::new(model());
            assert_eq!(externals.locations(), ["a", "b"]);
            for chunk in file.chunks(size) {
                externals.push("a", chunk).unwrap();
            }
            externals.push("b", &[7, 8, 9]).unwrap();
            let model = externals.resolve().unwrap();
            let five = &[10, 11, 12, 13, 14][..];
            let contents: Vec<_> = model.graph.initializers.iter().map(bytes).collect();
            assert_eq!(contents, [five, &[7, 8, 9], &[0, 1, 2, 3], five]);
        }
    }

    #[test]
    fn a_short_file_is_named() {
        let mut externals = Externals::new(model());
        externals.push("a", &[0; 14]).unwrap();
        externals.push("b", &[0; 3]).unwrap();
        let error = externals.resolve().unwrap_err();
        assert_eq!(error.code, ErrorCode::ExternalData);
        assert_eq!(error.message, "a tensor is in bytes 10 to 15 of \"a\", which has only 14");
    }

    #[test]
    fn an_unknown_file_is_refused() {
        let error = Externals::new(model()).push("c", &[1]).unwrap_err();
        assert_eq!(error.code, ErrorCode::ExternalData);
    }
}
