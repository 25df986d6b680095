//! The forward pass of one part of a decoder layer, for all families.

use std::sync::Arc;

use dfdx::tensor::Tape;

use super::{
    History, Positions,
    activation_cache::KnownOutputs,
    history::attend,
    ops::{Heads, InputGradient, Matrix, Norm, Ops, Route, Weight, Weighted, gate, route},
    positions::Rotations,
};
use crate::family::{self, Activation, Attention, Feed, Gating, Part, Projection, Role};

/// The weights of one part of a decoder layer.
#[derive(Clone, Debug)]
pub struct PartWeights<D: Ops> {
    /// The part.
    pub part: Part,
    /// The part's projections.
    pub projections: Vec<Projection>,
    /// The norm before the part.
    pub input_norm: Option<Norm<D>>,
    /// The weight of each projection.
    pub linears: Vec<Weight<D>>,
    /// The function between the projections.
    pub inner: Inner<D>,
    /// The router, if the part has experts.
    pub router: Option<Router<D>>,
    /// The norm of the part's output.
    pub output_norm: Option<Norm<D>>,
    /// The norm of the hidden states after the part's output was added.
    pub residual_norm: Option<Norm<D>>,
    /// Whether the MLP of the part's layer reads the hidden states before attention. Between the
    /// parts of such a layer, hidden states are twice as wide: those before attention, then those
    /// after it.
    pub parallel: bool,
}

/// The function between the projections of a part; see [`crate::family::Inner`].
#[derive(Clone, Debug)]
pub enum Inner<D: Ops> {
    /// Causal attention.
    Attention(Box<AttentionWeights<D>>),
    /// A gate times up.
    Gated(Gating),
    /// activation(x).
    Plain(Activation),
}

/// The weights of attention beside its projections.
#[derive(Clone, Debug)]
pub struct AttentionWeights<D: Ops> {
    /// The settings.
    pub of: Attention,
    /// The norms of queries and of keys.
    pub head_norms: Option<[Norm<D>; 2]>,
    /// The sinks, one for each query head.
    pub sinks: Option<Arc<Vec<f32>>>,
    /// The norms of the latents of queries, if they have one, and of keys and values, if these are
    /// projected from latents.
    pub latents: Option<(Option<Norm<D>>, Norm<D>)>,
}

/// The router of a part with experts.
#[derive(Clone, Debug)]
pub struct Router<D: Ops> {
    /// The projection of hidden states to the logits of experts.
    pub weight: Weight<D>,
    /// The numbers that are added to scores for the choice, one for each expert.
    pub correction: Option<Vec<f32>>,
    /// The gate of the shared expert, if it has one.
    pub shared_gate: Option<Weight<D>>,
    /// The settings.
    pub of: family::Router,
}

fn normalise<D: Ops, T: Tape<f32, D> + 'static>(
    x: Matrix<D, T>,
    norm: Option<&Norm<D>>,
) -> Result<Matrix<D, T>, D::Err> {
    norm.into_iter().try_fold(x, D::normalise)
}

impl<D: Ops> PartWeights<D> {
    /// The part's input: the hidden states, normalised where there is a norm.
    ///
    /// # Errors
    /// If the device runs out of memory.
    pub fn normalise<T: Tape<f32, D> + 'static>(
        &self,
        states: Matrix<D, T>,
    ) -> Result<Matrix<D, T>, D::Err> {
        let width = states.shape().1 / 2;
        let states = if self.is_beside() { D::columns(states, 0..width)? } else { states };
        normalise(states, self.input_norm.as_ref())
    }

    /// Whether the part reads hidden states that the part before it did not change.
    fn is_beside(&self) -> bool {
        self.parallel && self.part == Part::Mlp
    }

    /// The hidden states after the part.
    pub(super) fn residual<T: Tape<f32, D> + 'static>(
        &self,
        states: Matrix<D>,
        output: Matrix<D, T>,
    ) -> Result<Matrix<D, T>, D::Err> {
        if self.is_beside() {
            let (width, (output, tape)) = (output.shape().1, output.split_tape());
            let states = D::columns(states.put_tape(tape), width..2 * width)?;
            return normalise(D::add(states, output)?, self.residual_norm.as_ref());
        }
        let after = normalise(D::add(output, states.clone())?, self.residual_norm.as_ref())?;
        if !self.parallel {
            return Ok(after);
        }
        let (after, tape) = after.split_tape();
        D::join(states.put_tape(tape), after, 1)
    }

    /// The indices of the projections with this feed, of an expert or of a part without experts.
    pub(super) fn fed_by(&self, feed: Feed, expert: Option<usize>) -> Vec<usize> {
        let all = self.projections.iter().enumerate();
        let own = all.filter(|(_, of)| of.feed() == feed && of.expert == expert);
        own.map(|(i, _)| i).collect()
    }

    /// Index of the projection that gives the output of an expert, or of a part without experts.
    fn output(&self, expert: Option<usize>) -> usize {
        let is_output = |of: &Projection| of.feed() == Feed::Inner && of.expert == expert;
        self.projections.iter().position(is_output).unwrap_or_default()
    }

    /// The tensor whose output the part's is: that of a projection, or all experts together.
    pub(super) fn output_name(&self) -> &str {
        match &self.router {
            Some(router) => &router.of.experts,
            None => self.projections.get(self.output(None)).map_or("", |of| &of.weight),
        }
    }

    /// The part, with the projections of `members` traced for their gradients.
    pub(super) fn traced(&self, members: &[usize]) -> Self {
        let mut traced = self.clone();
        members.iter().for_each(|&i| traced.linears[i] = traced.linears[i].traced());
        traced
    }
}

/// An input that several projections of a part share.
pub(super) struct Input<'a, D: Ops> {
    pub(super) part: Part,
    pub(super) feed: Feed,
    /// The indices of the projections.
    pub(super) projections: &'a [usize],
    /// The indices of the input's rows in the batch, in order; `None` for all rows.
    pub(super) rows: Option<&'a [usize]>,
    /// The values, [tokens, channels].
    pub(super) x: &'a Matrix<D>,
}

/// Gets the inputs and outputs of projections in a forward pass.
pub(super) trait Hook<D: Ops> {
    /// Gets an input.
    fn input(&mut self, input: &Input<'_, D>) -> Result<(), D::Err> {
        let _ = input;
        Ok(())
    }

    /// Gets the output `y` of a projection.
    fn output(&mut self, projection: usize, y: &Matrix<D>) {
        let _ = (projection, y);
    }

    /// Gets the output `y` of an expert, before its weights.
    fn expert(&mut self, expert: usize, y: &Matrix<D>) -> Result<(), D::Err> {
        let _ = (expert, y);
        Ok(())
    }

    /// Gets the routes of the experts whose outputs came before.
    fn routes(&mut self, routes: &[Route]) {
        let _ = routes;
    }
}

/// The hooks of a forward pass, the outputs that are cached, and what the tokens follow.
pub(super) struct Hooks<'a, D: Ops> {
    pub(super) hooks: Vec<&'a mut dyn Hook<D>>,
    pub(super) known: KnownOutputs<'a, D>,
    /// The histories of the sequences; `None` if they begin with these tokens, and end. A pass with
    /// histories has no gradients.
    pub(super) histories: Option<&'a mut [History]>,
}

impl<D: Ops> Hooks<'_, D> {
    fn input(&mut self, input: &Input<'_, D>) -> Result<(), D::Err> {
        self.hooks.iter_mut().try_for_each(|hook| hook.input(input))
    }
}

impl<D: Ops> Default for Hooks<'_, D> {
    /// No hook, no cached outputs and no histories.
    fn default() -> Self {
        Self { hooks: Vec::new(), known: KnownOutputs::default(), histories: None }
    }
}

/// An expert of a part, or all of a part without experts, and its rows of the batch; `None` for all.
#[derive(Clone, Copy)]
struct Unit<'a> {
    expert: Option<usize>,
    rows: Option<&'a Arc<[usize]>>,
}

impl Unit<'_> {
    /// All of a part without experts, or the shared expert.
    const WHOLE: Self = Self { expert: None, rows: None };
}

fn linear<D: Ops, T: Tape<f32, D> + 'static>(
    weights: &PartWeights<D>,
    (projection, rows): (usize, Option<&Arc<[usize]>>),
    x: Matrix<D, T>,
    input_gradient: InputGradient,
    hooks: &mut Hooks<'_, D>,
) -> Result<Matrix<D, T>, D::Err> {
    let (x, tape) = x.split_tape();
    let known = hooks.known.output(projection, &x)?;
    let x = x.put_tape(tape);
    let weight = &weights.linears[projection];
    let (y, tape) = match rows {
        None => D::linear(x, weight, input_gradient, known)?,
        Some(rows) => D::linear(x, &weight.of_rows(rows), input_gradient, known)?,
    }
    .split_tape();
    hooks.hooks.iter_mut().for_each(|hook| hook.output(projection, &y));
    Ok(y.put_tape(tape))
}

/// The output of a part, without the residual, for its normalised input.
///
/// # Errors
/// If the device runs out of memory.
pub fn forward<D: Ops, T: Tape<f32, D> + 'static>(
    weights: &PartWeights<D>,
    positions: &Positions,
    input: Matrix<D, T>,
    input_gradient: InputGradient,
) -> Result<Matrix<D, T>, D::Err> {
    forward_with(weights, positions, input, input_gradient, &mut Hooks::default())
}

/// [`forward`] with hooks.
pub(super) fn forward_with<D: Ops, T: Tape<f32, D> + 'static>(
    weights: &PartWeights<D>,
    positions: &Positions,
    input: Matrix<D, T>,
    input_gradient: InputGradient,
    hooks: &mut Hooks<'_, D>,
) -> Result<Matrix<D, T>, D::Err> {
    let mut outputs = Vec::new();
    let routed = each_unit(weights, input, input_gradient, |unit, x| {
        let inner = inner(weights, unit, positions, x, input_gradient, hooks)?;
        let output = (weights.output(unit.expert), unit.rows);
        let output = linear(weights, output, inner, InputGradient::Wanted, hooks)?;
        let (y, tape) = output.split_tape();
        if let Some(expert) = unit.expert {
            hooks.hooks.iter_mut().try_for_each(|hook| hook.expert(expert, &y))?;
        }
        outputs.push(y.put_tape(tape));
        Ok(())
    })?;
    if let Some(routed) = &routed {
        hooks.hooks.iter_mut().for_each(|hook| hook.routes(&routed.routes));
    }
    let output = match routed {
        Some(routed) => routed.sum(outputs)?,
        None => outputs.swap_remove(0),
    };
    normalise(output, weights.output_norm.as_ref())
}

/// A forward pass up to the inputs of the projections that give the part's output, for its hooks.
pub(super) fn inputs<D: Ops, T: Tape<f32, D> + 'static>(
    weights: &PartWeights<D>,
    positions: &Positions,
    input: Matrix<D, T>,
    input_gradient: InputGradient,
    hooks: &mut Hooks<'_, D>,
) -> Result<(), D::Err> {
    each_unit(weights, input, input_gradient, |unit, x| {
        inner(weights, unit, positions, x, input_gradient, hooks).map(drop)
    })
    .map(drop)
}

/// The weights of the outputs of a part with experts.
struct Routed<D: Ops, T> {
    /// The weights of each token's experts.
    weights: Matrix<D, T>,
    routes: Arc<[Route]>,
    /// The weights of the shared expert, if it has a gate, and its route.
    shared: Option<Weighted<D, T>>,
}

impl<D: Ops, T: Tape<f32, D> + 'static> Routed<D, T> {
    /// The weighted sum of the experts' outputs, the shared one's last.
    fn sum(self, mut outputs: Vec<Matrix<D, T>>) -> Result<Matrix<D, T>, D::Err> {
        let of_shared = outputs.split_off(self.routes.len()).pop();
        let y = D::combine(outputs, self.weights, &self.routes)?;
        let shared = match (of_shared, self.shared) {
            (None, _) => return Ok(y),
            (Some(output), None) => output,
            (Some(output), Some((weights, all))) => D::combine(vec![output], weights, &all)?,
        };
        let ((y, tape), (shared, other)) = (y.split_tape(), shared.split_tape());
        D::add(y.put_tape(tape.merge(other)), shared)
    }
}

/// Calls `run` with each expert that has tokens and its input, in the experts' order, then with the
/// shared expert; without experts, once with the whole part.
fn each_unit<D: Ops, T: Tape<f32, D> + 'static>(
    weights: &PartWeights<D>,
    input: Matrix<D, T>,
    input_gradient: InputGradient,
    mut run: impl FnMut(Unit<'_>, Matrix<D, T>) -> Result<(), D::Err>,
) -> Result<Option<Routed<D, T>>, D::Err> {
    let Some(Router { weight, correction, shared_gate, of }) = &weights.router else {
        run(Unit::WHOLE, input)?;
        return Ok(None);
    };
    let (input, tape) = input.split_tape();
    let logits = D::linear(input.clone().put_tape(tape), weight, input_gradient, None)?;
    let (of_experts, routes) = route(logits, of.active, of.scoring, correction.as_deref())?;
    for Route { expert, rows, .. } in &*routes {
        let input = input.clone();
        let x = match input_gradient {
            InputGradient::Wanted => D::rows(input.put_tape(T::default()), rows)?,
            InputGradient::Skipped => D::rows(input, rows)?.put_tape(T::default()),
        };
        run(Unit { expert: Some(*expert), rows: Some(rows) }, x)?;
    }
    let again = || input.clone().put_tape(T::default());
    if weights.projections.iter().any(|of| of.expert.is_none()) {
        run(Unit::WHOLE, again())?;
    }
    let shared = shared_gate.as_ref().map(|weight| {
        let logits = D::linear(again(), weight, input_gradient, None)?;
        gate(logits)
    });
    Ok(Some(Routed { weights: of_experts, routes, shared: shared.transpose()? }))
}

/// The input of the output projection of an expert, or of a part without experts, for its input.
fn inner<D: Ops, T: Tape<f32, D> + 'static>(
    weights: &PartWeights<D>,
    unit: Unit<'_>,
    positions: &Positions,
    input: Matrix<D, T>,
    input_gradient: InputGradient,
    hooks: &mut Hooks<'_, D>,
) -> Result<Matrix<D, T>, D::Err> {
    let width = weights.linears[weights.output(unit.expert)].inputs();
    // These projections share their input; the first one takes the tape.
    let (input, tape) = input.split_tape();
    let of = |feed| (weights.part, feed, weights.fed_by(feed, unit.expert));
    let rows = unit.rows.map(|rows| &**rows);
    let (part, feed, fed) = of(Feed::Hidden);
    hooks.input(&Input { part, feed, projections: &fed, rows, x: &input })?;
    let has = |role| fed.iter().any(|&i| weights.projections[i].role == role);
    let fused_by_head = has(Role::HeadQueryKeyValue);
    let interleaved = has(Role::InterleavedGateUp);
    let mut tape = Some(tape);
    let mut projections = Vec::with_capacity(3);
    for projection in fed {
        let x = input.clone().put_tape(tape.take().unwrap_or_default());
        projections.push(linear(weights, (projection, unit.rows), x, input_gradient, hooks)?);
    }
    let inner = match &weights.inner {
        Inner::Attention(own) => {
            let AttentionWeights { of: attention, head_norms, sinks, latents } = &**own;
            let rotations = attention.rope.and_then(|rope| positions.rotations.get(rope));
            let [q, k, v] = if let Some(norms) = latents {
                let projections = split(projections, [0, 0], None)?;
                let mut project = |feed, x| latent(weights, unit, feed, x, hooks);
                from_latents(attention, norms, rotations, projections, &mut project)?
            } else {
                let (q, k) =
                    (attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim);
                let by_head = fused_by_head.then_some(attention.kv_heads);
                let [mut q, mut k, v] = split(projections, [q, k, k], by_head)?;
                if let Some([q_norm, k_norm]) = head_norms {
                    q = D::normalise(q, q_norm)?;
                    k = D::normalise(k, k_norm)?;
                }
                if let Some(Rotations { queries, keys }) = rotations {
                    q = D::rotary(q, queries, (attention.head_dim, 0))?;
                    k = D::rotary(k, keys, (attention.head_dim, 0))?;
                }
                [q, k, v]
            };
            let heads = Heads {
                queries: attention.heads,
                keys: attention.kv_heads,
                width: attention.head_dim,
                values: attention.value_dim,
                sequence_length: positions.length,
                scale: attention.scale,
                window: attention.window,
                cap: attention.score_cap,
            };
            let known = match hooks.histories.as_deref_mut() {
                None => hooks.known.attention(),
                Some(histories) => {
                    let sinks = sinks.as_ref().map(|sinks| &sinks[..]);
                    attend(histories, [&q, &k, &v], heads, sinks)?
                }
            };
            D::attention(q, k, v, heads, positions.masks.as_ref(), sinks.as_ref(), known)?
        }
        Inner::Gated(gating) => {
            let [gate, up] = split(projections, [width, width], interleaved.then_some(width))?;
            D::gated(gate, up, *gating)?
        }
        Inner::Plain(activation) => {
            let [x] = split(projections, [width], None)?;
            D::activate(x, *activation)?
        }
    };
    let (inner, tape) = inner.split_tape();
    let (part, feed, fed) = of(Feed::Inner);
    hooks.input(&Input { part, feed, projections: &fed, rows, x: &inner })?;
    Ok(inner.put_tape(tape))
}

/// The output of the projection with this feed, a latent.
fn latent<D: Ops, T: Tape<f32, D> + 'static>(
    weights: &PartWeights<D>,
    unit: Unit<'_>,
    feed: Feed,
    x: Matrix<D, T>,
    hooks: &mut Hooks<'_, D>,
) -> Result<Matrix<D, T>, D::Err> {
    let (x, tape) = x.split_tape();
    let fed = weights.fed_by(feed, unit.expert);
    let rows = unit.rows.map(|rows| &**rows);
    hooks.input(&Input { part: weights.part, feed, projections: &fed, rows, x: &x })?;
    let projection = fed.first().copied().unwrap_or_default();
    linear(weights, (projection, unit.rows), x.put_tape(tape), InputGradient::Wanted, hooks)
}

/// Queries, keys and values of latent attention, for the outputs of the projections of hidden states:
/// queries or their latent, and the latent of keys and values. `project` gives what is projected from
/// a normalised latent.
fn from_latents<D: Ops, T: Tape<f32, D> + 'static>(
    attention: &Attention,
    (query_norm, norm): &(Option<Norm<D>>, Norm<D>),
    rotations: Option<&Rotations>,
    [q, latent]: [Matrix<D, T>; 2],
    project: &mut impl FnMut(Feed, Matrix<D, T>) -> Result<Matrix<D, T>, D::Err>,
) -> Result<[Matrix<D, T>; 3], D::Err> {
    let mut q = match query_norm {
        Some(norm) => project(Feed::QueryLatent, D::normalise(q, norm)?)?,
        None => q,
    };
    let (width, all) = (norm.weight.shape().1, latent.shape().1);
    let (latent, tape) = latent.split_tape();
    let mut rotated = D::columns(latent.clone().put_tape(T::default()), width..all)?;
    let latent = D::columns(latent.put_tape(tape), 0..width)?;
    let both = project(Feed::KeyValueLatent, D::normalise(latent, norm)?)?;
    let plain = attention.head_dim - (all - width);
    if let Some(Rotations { queries, keys }) = rotations {
        q = D::rotary(q, queries, (attention.head_dim, plain))?;
        rotated = D::rotary(rotated, keys, (all - width, 0))?;
    }
    let group = plain + attention.value_dim;
    let (both, tape) = both.split_tape();
    let v = D::columns_of_each(both.clone().put_tape(T::default()), group, plain..group)?;
    let k = D::columns_of_each(both.put_tape(tape), group, 0..plain)?;
    let ((k, tape), (rotated, other)) = (k.split_tape(), rotated.split_tape());
    let k = D::join(k.put_tape(tape.merge(other)), rotated, attention.heads)?;
    Ok([q, k, v])
}

/// The outputs of projections with the given numbers of columns, which may be fused into one, in
/// this order, or in each of so many `groups` of columns.
fn split<D: Ops, T: Tape<f32, D> + 'static, const N: usize>(
    projections: Vec<Matrix<D, T>>,
    widths: [usize; N],
    groups: Option<usize>,
) -> Result<[Matrix<D, T>; N], D::Err> {
    let projections = match <[Matrix<D, T>; N]>::try_from(projections) {
        Ok(separate) => return Ok(separate),
        Err(fused) => fused,
    };
    let groups = groups.unwrap_or(1);
    let mut start = 0;
    let mut parts = Vec::with_capacity(N);
    for fused in projections {
        let group = fused.shape().1 / groups;
        let (fused, tape) = fused.split_tape();
        let mut tape = Some(tape);
        for width in widths {
            let (x, width) =
                (fused.clone().put_tape(tape.take().unwrap_or_default()), width / groups);
            parts.push(D::columns_of_each(x, group, start..start + width)?);
            start += width;
        }
    }
    Ok(parts.try_into().unwrap_or_else(|_| unreachable!("a family has one projection, or N")))
}
