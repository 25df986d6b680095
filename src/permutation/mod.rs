//! Permutations of inner channels: the columns of a part's output projection, with the rows, and the
//! biases, of the projections that feed it. The model computes the same with its inner channels in
//! another order, but a pattern N:M finds other columns in its tiles.
//!
//! Of an MLP, or an expert, all channels can be permuted; of self-attention the values of each
//! key/value head, alike in all query heads that it serves.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    checkpoint::{Axis, Cut, Orders},
    executor::Loss,
    family::{Decoder, Feed, Inner, Part, Projection, Role, Sublayer},
    mask::Channels,
    plan::{Member, Plan},
};

/// The order of some channels: the dense model's channel at each place.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Order(pub Vec<usize>);

/// What a run did to the inner channels of a part of a layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PermutedPart {
    /// Index of the decoder layer.
    pub layer: usize,
    /// Name of the part.
    pub part: String,
    /// Mean squared error of the part's output with Wanda's masks of its output projections, in the
    /// dense model's order.
    pub before: Loss,
    /// The same in the order that the search found.
    pub after: Loss,
    /// The orders of channels, by the tensor name of the output projection: empty if they do not lower
    /// the error.
    pub orders: BTreeMap<String, Order>,
}

impl PermutedPart {
    /// What was done to all parts, in words; `None` if nothing was tried.
    pub fn in_words(all: &[Self]) -> Option<String> {
        let permuted = all.iter().filter(|of| !of.orders.is_empty());
        let lowered: f64 =
            permuted.clone().map(|of| 1.0 - of.after.calibration / of.before.calibration).sum();
        let count = permuted.count();
        let lowered = 100.0 * lowered / all.len().max(1) as f64;
        (!all.is_empty()).then(|| {
            format!(
                "inner channels in {count} of {} parts of layers; output error with Wanda's masks of \
                 their output projections {lowered:.1}% lower (mean of the parts)",
                all.len()
            )
        })
    }
}

/// The output projections whose channels a run permutes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Number of those that it permutes.
    pub permuted: usize,
    /// Number of those that it prunes in tiles, but tiles span heads.
    pub spanned: usize,
    /// Number of channels whose order is reported.
    pub channels: usize,
}

impl Reach {
    /// The output projections of a plan.
    pub fn of(plan: &Plan, decoder: &Decoder) -> Self {
        let mut reach = Self::default();
        for layer in 0..plan.layers.len() {
            for (site, _) in
                Part::ALL.iter().flat_map(|part| Site::planned(plan, decoder, (layer, *part)))
            {
                reach.permuted += 1;
                reach.channels += site.slices[0].places().len();
            }
            let tiled = plan.matrices(decoder, layer).filter(|(member, linear)| {
                linear.feed() == Feed::Inner && member.rule.pattern.ratio().is_some()
            });
            reach.spanned += tiled.count();
        }
        reach.spanned -= reach.permuted;
        reach
    }
}

impl fmt::Display for Reach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "inner channels of {} output projections", self.permuted)?;
        match self.spanned {
            0 => Ok(()),
            others => write!(f, "; not those of {others} others, whose tiles span several heads"),
        }
    }
}

/// The inner channels of a part, or of one of its experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Site {
    /// Index of the output projection into the part's projections.
    pub output: usize,
    /// Number of channels that can be permuted with one another.
    pub count: usize,
    /// What the channels have of each projection, that of the output projection first.
    slices: Vec<Slice>,
}

/// The rows or columns of a projection that belong to channels.
#[derive(Clone, Debug, PartialEq)]
struct Slice {
    linear: usize,
    axis: Axis,
    /// The channel of each row or column, if it belongs to one.
    channels: Vec<Option<usize>>,
}

impl Site {
    /// The inner channels of a part.
    pub fn all(part: &Sublayer) -> Vec<Self> {
        let outputs = part.projections.iter().enumerate();
        let outputs = outputs.filter(|(_, of)| of.feed() == Feed::Inner);
        outputs.map(|(output, of)| Self::of(part, output, of)).collect()
    }

    fn of(part: &Sublayer, output: usize, down: &Projection) -> Self {
        let (count, columns) = match &part.inner {
            Inner::Attention(of) => {
                let (value, queries) = (of.value_dim, of.heads / of.kv_heads.max(1));
                let head = |column: usize| column / value / queries;
                let columns = (0..down.dims.columns).map(|i| Some(head(i) * value + i % value));
                (value, columns.collect())
            }
            Inner::Gated(_) | Inner::Plain(_) => {
                (down.dims.columns, (0..down.dims.columns).map(Some).collect())
            }
        };
        let inner = part.projections.iter().enumerate();
        let inner = inner.filter(|(_, of)| of.expert == down.expert);
        let rows = inner.filter_map(|(linear, of)| {
            let channels = rows(part, of, count)?;
            Some(Slice { linear, axis: Axis::Rows, channels })
        });
        let own = Slice { linear: output, axis: Axis::Columns, channels: columns };
        Self { output, count, slices: std::iter::once(own).chain(rows).collect() }
    }

    /// The sites of a part of a layer whose output projections the plan prunes in tiles, which do not
    /// span heads.
    pub fn planned(
        plan: &Plan,
        decoder: &Decoder,
        (layer, part): (usize, Part),
    ) -> Vec<(Self, Member)> {
        let sites = Self::all(decoder.layers[layer].part(part)).into_iter();
        let planned = sites.filter_map(|site| {
            let mut members = plan.matrices(decoder, layer).map(|(member, _)| member);
            let member = members.find(|of| (of.part, of.linear) == (part, site.output))?;
            let pattern = member.rule.pattern;
            (pattern.ratio().is_some() && pattern.divides(site.count)).then_some((site, member))
        });
        planned.collect()
    }

    /// About the number of comparisons of importances in the search for the order of all channels.
    pub fn search(plan: &Plan, decoder: &Decoder) -> f64 {
        let places = (0..plan.layers.len()).flat_map(|i| Part::ALL.map(|part| (i, part)));
        let sites = places.flat_map(|place| {
            let linears = decoder.layers[place.0].projections(place.1);
            let sites = Self::planned(plan, decoder, place).into_iter();
            sites.map(|(site, member)| {
                let weights = linears[site.output].dims.len() / site.count.max(1);
                Channels::work(site.count, weights, member.rule.pattern)
            })
        });
        sites.sum()
    }

    /// The channels that can be permuted with one another, group by group, given the importances of
    /// the output projection's weights, row-major.
    pub fn channels(&self, importances: &[f32]) -> Vec<Channels> {
        let columns = &self.slices[0].channels;
        let rows = importances.len() / columns.len().max(1);
        let places = self.slices[0].places();
        let of_group = |group: &[Vec<usize>]| {
            let length = rows * group.first().map_or(0, Vec::len);
            let mut all = Vec::with_capacity(length * group.len());
            for place in group.iter().flatten() {
                all.extend(importances.iter().skip(*place).step_by(columns.len()));
            }
            Channels::new(length, all)
        };
        places.chunks(self.count.max(1)).map(of_group).collect()
    }

    /// The order of the output projection's columns with this order of channels.
    pub fn columns(&self, order: &Order) -> Vec<usize> {
        self.slices[0].ordered(order)
    }

    /// The order of the rows and columns of all tensors with this order of channels.
    fn orders<'a>(
        &'a self,
        part: &'a Sublayer,
        order: &'a Order,
    ) -> impl Iterator<Item = (String, Cut)> + 'a {
        self.slices.iter().flat_map(move |slice| {
            let of = &part.projections[slice.linear];
            let cut = Cut { axis: slice.axis, kept: slice.ordered(order) };
            let bias = of.bias.iter().filter(|_| slice.axis == Axis::Rows).cloned();
            bias.chain([of.weight.clone()]).map(move |name| (name, cut.clone()))
        })
    }

    /// Whether the order has each channel once, in its own group.
    fn fits(&self, Order(order): &Order) -> bool {
        let all = self.slices[0].places().len();
        let mut seen = vec![false; all];
        let own = |(place, channel): (usize, &usize)| {
            *channel < all
                && channel / self.count == place / self.count
                && !std::mem::replace(&mut seen[*channel], true)
        };
        order.len() == all && order.iter().enumerate().all(own)
    }
}

impl Slice {
    /// The rows or columns of each channel.
    fn places(&self) -> Vec<Vec<usize>> {
        let count = self.channels.iter().flatten().max().map_or(0, |last| last + 1);
        let mut places = vec![Vec::new(); count];
        for (place, channel) in self.channels.iter().enumerate() {
            channel.iter().for_each(|channel| places[*channel].push(place));
        }
        places
    }

    /// The order of all rows or columns with this order of channels.
    fn ordered(&self, Order(order): &Order) -> Vec<usize> {
        let mut ordered: Vec<usize> = (0..self.channels.len()).collect();
        let places = self.places();
        for (to, from) in places.iter().zip(order).map(|(to, from)| (to, &places[*from])) {
            to.iter().zip(from).for_each(|(to, from)| ordered[*to] = *from);
        }
        ordered
    }
}

/// The channel of each row of a projection that feeds the inner function; `None` if it has none.
fn rows(part: &Sublayer, of: &Projection, count: usize) -> Option<Vec<Option<usize>>> {
    let rows = of.dims.rows;
    let heads = match &part.inner {
        Inner::Attention(of) => of.kv_heads.max(1),
        Inner::Gated(_) | Inner::Plain(_) => 1,
    };
    // The last rows of each head, or of all heads, are values.
    let last = |of: usize, values: usize| {
        move |i: usize| (i % of).checked_sub(of - values).map(|i_of| i / of * values + i_of)
    };
    Some(match of.role {
        Role::Value | Role::QueryKeyValue => (0..rows).map(last(rows, heads * count)).collect(),
        Role::HeadQueryKeyValue | Role::LatentKeyValue => {
            (0..rows).map(last(rows / heads, count)).collect()
        }
        // Gate and up in one matrix are one after the other.
        Role::Gate | Role::Up | Role::GateUp => (0..rows).map(|i| Some(i % count)).collect(),
        Role::InterleavedGateUp => (0..rows).map(|i| Some(i / 2)).collect(),
        _ => return None,
    })
}

/// Why permutations are not those of a model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the channels of `{tensor}` cannot be in the order that is given for them")]
pub struct Error {
    /// Tensor name of the output projection.
    pub tensor: String,
}

/// The order of the rows and columns of a model's tensors with these permutations.
///
/// # Errors
/// If the model does not have the channels, or an order is not a permutation of those of a head or MLP.
pub fn orders(decoder: &Decoder, permuted: &[PermutedPart]) -> Result<Orders, Error> {
    let mut all = Orders::new();
    let mut left: BTreeMap<&str, &Order> =
        permuted.iter().flat_map(|of| &of.orders).map(|(name, of)| (&**name, of)).collect();
    for part in decoder.layers.iter().flat_map(|layer| Part::ALL.map(|part| layer.part(part))) {
        for site in Site::all(part) {
            let tensor = &part.projections[site.output].weight;
            let Some(order) = left.remove(&**tensor) else { continue };
            if !site.fits(order) {
                return Err(Error { tensor: tensor.clone() });
            }
            all.extend(site.orders(part, order));
        }
    }
    match left.pop_first() {
        Some((tensor, _)) => Err(Error { tensor: tensor.into() }),
        None => Ok(all),
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, channel) in self.0.iter().enumerate() {
            let comma = if i > 0 { ", " } else { "" };
            write!(f, "{comma}{channel}")?;
        }
        Ok(())
    }
}

impl FromStr for Order {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split(',').map(str::trim).filter(|_| !text.is_empty());
        let number = |text: &str| {
            text.parse().map_err(|_| format!("`{text}` is not the index of a channel"))
        };
        numbers.map(number).collect::<Result<_, _>>().map(Self)
    }
}

impl TryFrom<String> for Order {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Order> for String {
    fn from(order: Order) -> Self {
        order.to_string()
    }
}

#[cfg(test)]
mod tests;
