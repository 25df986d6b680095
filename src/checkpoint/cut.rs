//! Tensors of a smaller model: some of the dense model's, and some rows or columns of others.

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

    /// What is left of the elements of a tensor of this shape, or of their bytes; those beyond the
    /// tensor's end are left out.
    pub fn left<T: Copy>(&self, shape: &[usize], elements: &[T]) -> Vec<T> {
        // Pieces of equal size: rows, or the elements of a row.
        let (rows, columns) = (shape.first().copied().unwrap_or(1), shape.last().copied());
        let row = elements.len() / rows.max(1);
        let (whole, piece) = match self.axis {
            Axis::Rows => (elements.len(), row),
            Axis::Columns => (row, row / columns.unwrap_or(1).max(1)),
        };
        let count = elements.len() / whole.max(1) * piece * self.kept.len();
        let mut left = Vec::with_capacity(count);
        for whole in elements.chunks(whole.max(1)) {
            for &kept in &self.kept {
                left.extend_from_slice(whole.get(kept * piece..(kept + 1) * piece).unwrap_or(&[]));
            }
        }
        left
    }
}

/// A smaller model, made of a dense one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cuts {
    /// The smaller model's `config.json`.
    pub config: Value,
    /// What is left of the tensors that are cut, by the dense model's names.
    pub tensors: BTreeMap<String, Cut>,
    /// The numbers that are left of what the dense model numbers in its tensors' names, such as
    /// layers, by the start of these names: `model.layers.`.
    pub numbered: BTreeMap<String, Vec<usize>>,
    /// Tensors that the dense model lacks, by the names that it would have for them, with their shapes:
    /// zero unless they are changed.
    pub added: BTreeMap<String, Vec<usize>>,
}

impl Cuts {
    /// The shape that is left of a tensor.
    pub fn shape<'a>(&self, dense_name: &str, dense: &'a [usize]) -> Cow<'a, [usize]> {
        match self.tensors.get(dense_name) {
            Some(cut) => cut.shape(dense).into(),
            None => dense.into(),
        }
    }

    /// The smaller model's name of a tensor; `None` if it has no such tensor.
    pub fn name<'a>(&self, dense_name: &'a str) -> Option<Cow<'a, str>> {
        self.renumbered(dense_name, To::Smaller)
    }

    /// The dense model's name of a tensor of the smaller model; `None` if this has no such tensor.
    pub fn dense_name<'a>(&self, name: &'a str) -> Option<Cow<'a, str>> {
        self.renumbered(name, To::Dense)
    }

    fn renumbered<'a>(&self, name: &'a str, to: To) -> Option<Cow<'a, str>> {
        if self.numbered.is_empty() {
            return Some(name.into());
        }
        let (mut other, mut start) = (String::with_capacity(name.len()), 0);
        for segment in name.split_inclusive('.') {
            let dense = if to == To::Dense { &other } else { &name[..start] };
            let number = segment.strip_suffix('.').and_then(|number| number.parse::<usize>().ok());
            match self.numbered.get(dense).zip(number) {
                Some((kept, number)) => {
                    let number = match to {
                        To::Dense => *kept.get(number)?,
                        To::Smaller => kept.iter().position(|kept| *kept == number)?,
                    };
                    other += &format!("{number}.");
                }
                None => other += segment,
            }
            start += segment.len();
        }
        Some(other.into())
    }
}

/// The model whose names are wanted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum To {
    Smaller,
    Dense,
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
                let left = cut.left(&shape, &bytes);
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
            prop_assert_eq!(cut.left(&[columns], vector), expected);
            prop_assert_eq!(cut.shape(&[columns]), [kept.len()]);
        }
    }

    #[test]
    fn names_follow_the_numbers_that_are_left() {
        let kept = |start: &str, kept: &[usize]| (start.to_owned(), kept.to_vec());
        let numbered =
            [kept("model.layers.", &[0, 2, 5]), kept("model.layers.2.experts.", &[1, 3])];
        let cuts = Cuts { numbered: numbered.into_iter().collect(), ..Cuts::default() };
        for (dense, name) in [
            ("model.layers.0.q.weight", Some("model.layers.0.q.weight")),
            ("model.layers.1.q.weight", None),
            ("model.layers.5.experts.7.weight", Some("model.layers.2.experts.7.weight")),
            ("model.layers.2.experts.3.weight", Some("model.layers.1.experts.1.weight")),
            ("model.layers.2.experts.0.weight", None),
            ("model.layers.2.experts.bias", Some("model.layers.1.experts.bias")),
            ("model.embed.weight", Some("model.embed.weight")),
        ] {
            assert_eq!(cuts.name(dense).as_deref(), name);
            if let Some(name) = name {
                assert_eq!(cuts.dense_name(name).as_deref(), Some(dense));
            }
        }
        assert_eq!(cuts.dense_name("model.layers.3.q.weight"), None);
    }
}
