//! Tensors of a smaller model: some rows or columns of the dense model's, the others cut away.

use std::{borrow::Cow, collections::BTreeMap};

use serde_json::Value;

/// The dimension of a matrix that is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// The outputs; of a vector, its elements.
    Rows,
    /// The inputs.
    Columns,
}

/// What is left of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The dimension that is cut.
    pub axis: Axis,
    /// Indices of the rows or columns that are left, in order.
    pub kept: Vec<usize>,
}

impl Cut {
    /// The shape that is left of a tensor of this shape.
    pub fn shape(&self, dense: &[usize]) -> Vec<usize> {
        let mut shape = dense.to_vec();
        let length = match self.axis {
            Axis::Rows => shape.first_mut(),
            Axis::Columns => shape.last_mut(),
        };
        length.into_iter().for_each(|length| *length = self.kept.len());
        shape
    }

    /// The bytes that are left of a tensor of this shape; elements beyond its end are left out.
    pub fn bytes(&self, shape: &[usize], bytes: &[u8]) -> Vec<u8> {
        // Pieces of equal size: rows, or the elements of a row.
        let (rows, columns) = (shape.first().copied().unwrap_or(1), shape.last().copied());
        let row = bytes.len() / rows.max(1);
        let (whole, piece) = match self.axis {
            Axis::Rows => (bytes.len(), row),
            Axis::Columns => (row, row / columns.unwrap_or(1).max(1)),
        };
        let mut left = Vec::with_capacity(bytes.len() / whole.max(1) * piece * self.kept.len());
        for whole in bytes.chunks(whole.max(1)) {
            for &kept in &self.kept {
                left.extend_from_slice(whole.get(kept * piece..(kept + 1) * piece).unwrap_or(&[]));
            }
        }
        left
    }
}

/// A smaller model, made of a dense one.
#[derive(Clone, Debug, PartialEq)]
pub struct Cuts {
    /// The smaller model's `config.json`.
    pub config: Value,
    /// What is left of the tensors that are cut, by name.
    pub tensors: BTreeMap<String, Cut>,
}

impl Cuts {
    /// The shape that is left of a tensor.
    pub fn shape<'a>(&self, name: &str, dense: &'a [usize]) -> Cow<'a, [usize]> {
        match self.tensors.get(name) {
            Some(cut) => cut.shape(dense).into(),
            None => dense.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Each kept row or column has the bytes that it had, and there are no others.
        #[test]
        fn what_is_left_has_its_bytes(
            rows in 1_usize..6,
            columns in 1_usize..6,
            size in 1_usize..5,
            seed: u64,
        ) {
            let bytes: Vec<u8> =
                (0..rows * columns * size).map(|i| (i as u64 ^ seed) as u8).collect();
            let shape = [rows, columns];
            for (axis, length) in [(Axis::Rows, rows), (Axis::Columns, columns)] {
                let kept: Vec<usize> = (0..length).filter(|i| seed >> i & 1 == 1).collect();
                let cut = Cut { axis, kept: kept.clone() };
                let left = cut.bytes(&shape, &bytes);
                let new = cut.shape(&shape);
                prop_assert_eq!(left.len(), new[0] * new[1] * size);
                for i in 0..new[0] {
                    for j in 0..new[1] {
                        let (row, column) =
                            if axis == Axis::Rows { (kept[i], j) } else { (i, kept[j]) };
                        let at = |row: usize, column: usize, columns: usize| {
                            let start = (row * columns + column) * size;
                            start..start + size
                        };
                        prop_assert_eq!(
                            &left[at(i, j, new[1])],
                            &bytes[at(row, column, columns)]
                        );
                    }
                }
            }
            // A vector, such as a bias.
            let kept: Vec<usize> = (0..columns).filter(|i| seed >> i & 1 == 1).collect();
            let cut = Cut { axis: Axis::Rows, kept: kept.clone() };
            let vector = &bytes[..columns * size];
            let expected: Vec<u8> =
                kept.iter().flat_map(|i| &vector[i * size..(i + 1) * size]).copied().collect();
            prop_assert_eq!(cut.bytes(&[columns], vector), expected);
            prop_assert_eq!(cut.shape(&[columns]), [kept.len()]);
        }
    }
}
