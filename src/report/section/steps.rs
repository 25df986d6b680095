//! Divergence of the whole model's predictions, step by step.

use maud::{Markup, html};

use crate::{
    prune::Step,
    report::{
        Report,
        axis::Axis,
        chart::{self, Line, Lines, Scale, WIDE, legend},
        figure::{count, number},
        table::{details, table, text},
    },
};

const NAMES: [&str; 2] = ["held-out samples", "samples of the step"];

pub(super) fn body(report: &Report) -> Result<Markup, chart::Error> {
    let stages: Vec<Markup> =
        Step::by_stage(&report.steps).map(stage).collect::<Result<_, chart::Error>>()?;
    Ok(html! { @for stage in stages { (stage) } })
}

/// The steps of one stage.
fn stage(steps: &[Step]) -> Result<Markup, chart::Error> {
    let points = |of: fn(&Step) -> Option<f64>| -> Vec<(f64, f64)> {
        steps.iter().filter_map(|step| Some((step.step as f64, of(step)?))).collect()
    };
    let values = [points(|step| step.held_out), points(|step| step.calibration)];
    let lines = NAMES.iter().zip(values);
    let lines = lines.map(|(name, points)| Line { name: (*name).into(), points }).collect();
    let title = "Divergence of the predictions by step, in nats per token, logarithmic".to_owned();
    let x = Axis::numbers(steps.iter().map(|step| step.step).max().unwrap_or(0));
    let (scale, rings) = (Scale::Logarithmic, Vec::new());
    let chart =
        Lines { title, across: "step".into(), x, scale, lines, rings, size: WIDE }.draw()?;
    let swaps: usize = steps.iter().map(|step| step.swaps).sum();
    let swap = Step::are_swaps(steps);
    let shown = |value: Option<f64>| value.map_or_else(String::new, number);
    let rows = steps.iter().map(|step| {
        let &Step { step, calibration, held_out, kept, swaps, lambda } = step;
        let mut row = vec![count(step), shown(held_out), shown(calibration)];
        if swap {
            row.extend([shown(kept), count(swaps), shown(lambda)]);
        }
        row.iter().map(text).collect()
    });
    let rows: Vec<Vec<Markup>> = rows.collect();
    let heads = ["step", NAMES[0], NAMES[1], "last step's promise kept", "swaps", "λ"];
    let heads = if swap { &heads[..] } else { &heads[..3] };
    Ok(html! {
        p {
            @if swap {
                "After its layers, the masks of the whole model were refined by the divergence of its "
                "predictions from the dense model's, KL(dense ‖ sparse). Its masks have "
                (count(Step::lasting(steps))) " swaps of " (count(swaps)) " that were tried. The "
                "samples of the next step judge a step's swaps: where the divergence rose on them, the "
                "swaps were undone. The masks are those with the lowest divergence on the held-out "
                "samples."
            } @else {
                "The kept weights of the whole model were changed down the gradient of the divergence of "
                "its predictions from the dense model's, KL(dense ‖ sparse). The weights are those with "
                "the lowest divergence on the held-out samples."
            }
        }
        (legend(&NAMES, None)?)
        figure { figcaption { "Divergence by step (logarithmic)" } (chart) }
        (details("All steps, as a table", &table("Divergence and swaps by step", heads, rows)))
    })
}
