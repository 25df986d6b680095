//! The metric pipeline on one matrix: each metric sees the scores of those before it.

use barber_metric::{LayerStats, Metric, Needs, StructureStats};

use super::Error;

/// A step of a metric pipeline: the metric and its name.
pub type MetricStep = (String, Box<dyn Metric>);

/// The statistics that a pipeline needs.
pub(crate) fn needs(pipeline: &[MetricStep]) -> Needs {
    pipeline.iter().fold(Needs::NOTHING, |needs, (_, metric)| needs.or(metric.needs()))
}

/// The scores of a matrix's weights, row-major.
pub(super) fn score(pipeline: &[MetricStep], stats: &LayerStats<'_>) -> Result<Vec<f32>, Error> {
    let mut scores = vec![1.0; stats.weight.len()];
    for (name, metric) in pipeline.iter().filter(|(_, metric)| metric.structures().is_empty()) {
        metric.score(stats, &mut scores).map_err(|source| Error::Metric {
            metric: name.clone(),
            tensor: stats.name.into(),
            source,
        })?;
    }
    Ok(scores)
}

/// Has the metrics that score structures transform the scores of some.
pub(super) fn score_structures(
    pipeline: &[MetricStep],
    stats: &StructureStats<'_>,
    scores: &mut [f64],
) -> Result<(), Error> {
    let place = || match stats.layer {
        Some(layer) => format!("the {} of layer {layer}", stats.structure),
        None => format!("the {}", stats.structure),
    };
    for (name, metric) in pipeline {
        let scored = metric.score_structures(stats, scores);
        let failed = |source| Error::Metric { metric: name.clone(), tensor: place(), source };
        scored.map_err(failed)?;
        if let Some(score) = scores.iter().find(|score| !score.is_finite()) {
            return Err(failed(barber_metric::Error::Metric(format!(
                "it gives a score of {score}"
            ))));
        }
    }
    Ok(())
}
