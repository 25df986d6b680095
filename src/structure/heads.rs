//! Heads of self-attention: a head of keys and values with the query heads that it serves. These are
//! rows of the query, key and value projections, with their biases, and columns of the output's.

use super::{
    Axis, Kind, Owners, Part, Sublayer, Units, Whole, channels::left, config::set, in_each_layer,
};
use crate::family::{Attention, Inner, Role};

pub(super) static HEADS: Kind = Kind {
    name: "heads",
    help: "heads of keys and values with their query heads: the result is a smaller dense model",
    whole: Some(Whole {
        many: "key/value heads",
        is_of_model: false,
        has_multiples: false,
        leaves_inputs: true,
        sites: |decoder| in_each_layer(decoder, Part::Attention, units),
        configure: |config, decoder, kept| {
            let Some(of) = decoder.layers.first().and_then(|layer| heads(&layer.attention)) else {
                return;
            };
            let left = left(kept);
            set(config, &["num_attention_heads"], of.heads / of.kv_heads * left);
            set(config, &["num_key_value_heads"], left);
            set(config, &["head_dim"], of.head_dim);
        },
    }),
};

fn heads(part: &Sublayer) -> Option<&Attention> {
    match &part.inner {
        Inner::Attention(heads) => Some(heads),
        Inner::Gated(_) | Inner::Plain(_) => None,
    }
}

fn units(part: &Sublayer) -> Result<Units, &'static str> {
    let of = heads(part).ok_or("it has no attention")?;
    if of.head_norms.iter().any(|norms| norms.iter().any(|norm| norm.width != of.head_dim)) {
        return Err(
            "the queries or keys of all heads are normalised together, so that without one \
                    the others would change",
        );
    }
    if of.latents.is_some() {
        return Err("its keys and values are projected from latents, which all heads share");
    }
    if of.sinks.is_some() {
        return Err("its attention has a sink for each query head, and these are not removed");
    }
    let (key, count) = (of.head_dim, of.kv_heads);
    let query = of.heads / count.max(1) * key;
    let owners = part.projections.iter().map(|of| {
        // The rows or columns of each head of keys and values, one after the other.
        let all = |widths: &[usize]| -> Vec<usize> {
            let of = |width: &usize| {
                let width = *width;
                (0..count).flat_map(move |head| std::iter::repeat_n(head, width))
            };
            widths.iter().flat_map(of).collect()
        };
        match of.role {
            Role::Output => Owners::Each(Axis::Columns, all(&[query])),
            Role::Query => Owners::Each(Axis::Rows, all(&[query])),
            Role::QueryKeyValue => Owners::Each(Axis::Rows, all(&[query, key, key])),
            Role::HeadQueryKeyValue => Owners::Each(Axis::Rows, all(&[query + 2 * key])),
            _ => Owners::Each(Axis::Rows, all(&[key])),
        }
    });
    Ok((count, owners.collect()))
}
