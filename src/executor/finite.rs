//! Finds activations that are not finite, and the first place where one occurs.

use super::{
    Error, PartWeights,
    forward::Input,
    ops::{Matrix, Ops},
    stream::Batch,
};
use crate::family::Part;

/// An input of linear layers that is not finite.
#[derive(Clone, Copy, Debug)]
pub(super) struct Broken {
    part: Part,
    /// Index of the first of the input's projections.
    linear: usize,
    place: Place,
}

/// A place in a matrix, and its value.
#[derive(Clone, Copy, Debug)]
struct Place {
    row: usize,
    column: usize,
    value: f32,
}

impl Broken {
    /// The first value of an input that is not finite.
    pub(super) fn find<D: Ops>(input: &Input<'_, D>) -> Result<Option<Self>, D::Err> {
        let linear = input.projections.first().copied().unwrap_or_default();
        let row = |row: usize| input.rows.map_or(row, |rows| rows[row]);
        let of = |place: Place| Self {
            part: input.part,
            linear,
            place: Place { row: row(place.row), ..place },
        };
        Ok(find(input.x)?.map(of))
    }
}

fn find<D: Ops>(x: &Matrix<D>) -> Result<Option<Place>, D::Err> {
    let width = x.shape().1;
    let place = |(at, value)| Place { row: at / width, column: at % width, value };
    Ok(D::first_not_finite(x)?.map(place))
}

impl<D: Ops> Batch<D> {
    /// Checks that no input of the parts' linear layers was found to be broken.
    pub(super) fn check_inputs(
        &self,
        parts: &[PartWeights<D>],
        broken: Option<Broken>,
    ) -> Result<(), Error> {
        let Some(Broken { part, linear, place }) = broken else { return Ok(()) };
        let part = parts.iter().find(|weights| weights.part == part);
        let of = part.and_then(|part| part.projections.get(linear));
        Err(self.error("input", of.map_or("", |of| &of.weight), place))
    }

    /// Checks that the hidden states after the parts are finite.
    pub(super) fn check_states(
        &self,
        parts: &[PartWeights<D>],
        states: &Matrix<D>,
    ) -> Result<(), Error> {
        match find(states).map_err(Error::device)? {
            None => Ok(()),
            Some(place) => {
                let of = parts.last().map_or("", PartWeights::output_name);
                Err(self.error("output", of, place))
            }
        }
    }

    fn error(&self, what: &'static str, tensor: &str, place: Place) -> Error {
        let Place { row, column, value } = place;
        let sample = self.samples.iter().position(|sample| sample.contains(&row)).unwrap_or(0);
        let start = self.samples.get(sample).map_or(0, |sample| sample.start);
        Error::Activation {
            what,
            tensor: tensor.into(),
            sample: self.first + sample,
            token: row - start,
            channel: column,
            value,
        }
    }
}
