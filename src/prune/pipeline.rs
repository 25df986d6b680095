//! The metric pipeline on one matrix: each metric sees the scores of those before it.

use barber_metric::{LayerStats, Metric, Needs};

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
    for (name, metric) in pipeline {
        metric.score(stats, &mut scores).map_err(|source| Error::Metric {
            metric: name.clone(),
            tensor: stats.name.into(),
            source,
        })?;
    }
    Ok(scores)
}
