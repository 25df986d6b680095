//! `barber inspect`: shows the tensors of a checkpoint and their zeros.

use std::path::PathBuf;

use bytesize::ByteSize;
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    Error,
    columns::{
        Column::{self, Figures, Words},
        WIDTH, columns, wrapped,
    },
    progress::Terminal,
    show,
};
use crate::{
    checkpoint::{Reader, Zeros},
    hub::locate,
    progress::Steps,
    run::Watch,
};

/// Shows the contents of a checkpoint: for each decoder layer, or for each tensor with --tensors,
/// the number of weights and of zeros, the pattern of the zeros, the format, and the size in the
/// file, which is smaller for compressed and quantised matrices. Reads any safetensors checkpoint with a
/// config.json, of any family, one tensor at a time.
///
/// The pattern is N:M if no M consecutive inputs of a row keep more than N weights and most keep N;
/// `dense` if less than 1% are zero; otherwise `unstructured`.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  barber inspect out/quickstart
  barber inspect out/quickstart --tensors
  barber inspect HuggingFaceTB/SmolLM2-135M --json | jq .total.sparsity")]
pub(super) struct Arguments {
    /// The checkpoint: a directory in the Hugging Face layout, or `owner/name` on the hub.
    pub(super) dir: PathBuf,
    /// The branch, tag or commit of a model on the hub; main if left out.
    #[arg(long, value_name = "NAME")]
    revision: Option<String>,
    /// Show each tensor too.
    #[arg(long)]
    tensors: bool,
    /// Print JSON, each tensor included, and no progress.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Error> {
    let watch = Terminal { quiet: arguments.json };
    let new = |file: &str, bytes| watch.bar(file, Steps::Bytes(bytes));
    let located = locate(&arguments.dir, arguments.revision.as_deref(), &new, &|_| Ok(()))?;
    let reader = Reader::open(&located.dir)?;
    let tensors = tensors(&reader, watch)?;
    let places = places(&tensors);
    let (layers, total) = (Sum::of(tensors.iter().filter(in_layers)), Sum::of(&tensors));
    let stacks = stacks(&tensors);
    let files = reader.weight_files().count();
    let dense: usize = tensors.iter().map(|tensor| tensor.dense_bytes).sum();
    // The tensors of other quantisations are shown as they are stored.
    let quantisation = reader.quantisation().ok().flatten().map(ToString::to_string);
    let family = reader.config().get("model_type").and_then(Value::as_str);
    if arguments.json {
        let report = json!({
            "checkpoint": arguments.dir,
            "model_type": family,
            "files": files,
            "format": reader.format(),
            "quantisation": quantisation,
            "places": places,
            "layers": layers,
            "total": total,
            "tensors": tensors,
        });
        println!("{report}");
        return Ok(());
    }
    let compressed = match (&quantisation, reader.format()) {
        (Some(quantisation), _) => format!(", {quantisation}, of {}", size(dense)),
        (None, format) if format.is_dense() => String::new(),
        (None, format) => format!(", {format}, of {}", size(dense)),
    };
    let what = format!(
        "{}: {}{} tensors, {} in {files} {}{compressed}",
        show(&arguments.dir),
        family.map_or_else(String::new, |family| format!("{family}, ")),
        tensors.len(),
        size(total.bytes),
        if files == 1 { "file" } else { "files" },
    );
    println!("{}\n", wrapped("", "", &what));
    if arguments.tensors {
        println!("{}\n", each(&tensors));
    }
    println!("{}", summary(&places, &stacks, &total));
    for tensor in tensors.iter().filter(|tensor| tensor.not_finite > 0) {
        let Tensor { name, not_finite, weights, .. } = tensor;
        println!("\n{}: {not_finite} of {weights} values are NaN or infinite", name.escape_debug());
    }
    Ok(())
}

/// A tensor of the checkpoint.
#[derive(Serialize)]
struct Tensor {
    name: String,
    /// The names before the index of the tensor's layer, such as `model.layers`.
    #[serde(skip)]
    stack: String,
    /// Index of the tensor's layer, if it is in one.
    layer: Option<usize>,
    shape: Vec<usize>,
    dtype: String,
    /// Bytes in the file.
    bytes: usize,
    /// Bytes with all zeros, dequantised, which are more for a compressed or quantised matrix.
    dense_bytes: usize,
    /// Number of elements.
    weights: usize,
    /// Number of zeros; `None` if the format is unknown.
    zeros: Option<usize>,
    /// Number of elements that are NaN or infinite.
    not_finite: usize,
    /// The pattern of a matrix's zeros; `None` for vectors.
    pattern: Option<String>,
    file: String,
}

/// All tensors, in the order of the layers.
fn tensors(reader: &Reader, watch: Terminal) -> Result<Vec<Tensor>, Error> {
    let all: usize =
        reader.names().filter_map(|name| reader.tensor(name).ok()).map(|view| view.length()).sum();
    let bar = watch.bar("reading", Steps::Bytes(all as u64));
    let mut tensors = Vec::new();
    for name in reader.names() {
        let view = reader.tensor(name)?;
        let zeros = Zeros::of(view.dtype, view.shape, &view.bytes()?);
        let pattern = zeros.filter(|_| view.shape.len() > 1).map(|zeros| {
            zeros.pattern.map_or_else(|| "dense".into(), |pattern| pattern.to_string())
        });
        let (stack, layer) = layer(name).unzip();
        tensors.push(Tensor {
            name: name.into(),
            stack: stack.unwrap_or_default().into(),
            layer,
            shape: view.shape.to_vec(),
            dtype: format!("{:?}", view.dtype),
            bytes: view.stored,
            dense_bytes: view.length(),
            weights: view.shape.iter().product(),
            zeros: zeros.map(|zeros| zeros.count),
            not_finite: view.not_finite()?,
            pattern,
            file: view.file.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        });
        bar.advance(view.length() as u64);
    }
    drop(bar);
    // By their names alone, layer 10 would come before layer 2.
    tensors.sort_by(|a, b| (&a.stack, a.layer).cmp(&(&b.stack, b.layer)));
    Ok(tensors)
}

/// The names before the index of a tensor's layer, and the index, if it is in a layer.
fn layer(name: &str) -> Option<(&str, usize)> {
    let mut dots = name.match_indices('.').map(|(dot, _)| dot);
    dots.find_map(|dot| {
        let index = name[dot + 1..].split('.').next()?;
        Some((&name[..dot], index.parse().ok()?))
    })
}

fn in_layers(tensor: &&Tensor) -> bool {
    tensor.layer.is_some()
}

/// A decoder layer, or a tensor outside of them.
#[derive(Serialize)]
struct Place {
    name: String,
    #[serde(flatten)]
    sum: Sum,
}

fn places(tensors: &[Tensor]) -> Vec<Place> {
    let together =
        |a: &Tensor, b: &Tensor| a.layer.is_some() && (&a.stack, a.layer) == (&b.stack, b.layer);
    let several = stacks(tensors).len() > 1;
    let place = |tensors: &[Tensor]| {
        let first = tensors.first()?;
        let name = match first.layer {
            Some(layer) if several => format!("{}.{layer}", first.stack),
            Some(layer) => format!("layer {layer}"),
            None => short(&first.name).to_owned(),
        };
        Some(Place { name, sum: Sum::of(tensors) })
    };
    tensors.chunk_by(together).filter_map(place).collect()
}

/// The sums over the layers of each stack: a model with images has those of the vision tower, too.
fn stacks(tensors: &[Tensor]) -> Vec<(&str, Sum)> {
    let stacks = tensors.chunk_by(|a, b| a.stack == b.stack);
    let layers = stacks.filter(|tensors| tensors.iter().any(|tensor| tensor.layer.is_some()));
    layers.map(|tensors| (tensors[0].stack.as_str(), Sum::of(tensors))).collect()
}

/// A tensor's name without the usual suffix.
fn short(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

/// The sum over several tensors.
#[derive(Serialize)]
struct Sum {
    /// Number of elements of the matrices, without norms and biases.
    weights: usize,
    /// Number of zeros in the matrices; `None` if a format is unknown.
    zeros: Option<usize>,
    /// Fraction of zeros in the matrices.
    sparsity: Option<f64>,
    /// The pattern of the matrices' zeros; `mixed` if they have several.
    pattern: Option<String>,
    /// The formats of the matrices.
    dtypes: Vec<String>,
    /// The size of all tensors in the files.
    bytes: usize,
}

impl Sum {
    fn of<'a>(tensors: impl IntoIterator<Item = &'a Tensor> + Clone) -> Self {
        let matrices = || tensors.clone().into_iter().filter(|tensor| tensor.shape.len() > 1);
        let weights = matrices().map(|tensor| tensor.weights).sum();
        let zeros: Option<usize> = matrices().map(|tensor| tensor.zeros).sum();
        let different = |of: fn(&Tensor) -> Option<&String>| {
            let mut found: Vec<String> = matrices().filter_map(of).cloned().collect();
            found.sort_unstable();
            found.dedup();
            found
        };
        let pattern = match &different(|tensor| tensor.pattern.as_ref())[..] {
            [] => None,
            [one] => Some(one.clone()),
            _ => Some("mixed".into()),
        };
        Self {
            weights,
            zeros,
            sparsity: zeros.filter(|_| weights > 0).map(|zeros| zeros as f64 / weights as f64),
            pattern,
            dtypes: different(|tensor| Some(&tensor.dtype)),
            bytes: tensors.clone().into_iter().map(|tensor| tensor.bytes).sum(),
        }
    }

    fn row(&self, name: &str) -> Vec<String> {
        vec![
            name.to_owned(),
            if self.weights > 0 { self.weights.to_string() } else { String::new() },
            self.sparsity.map_or_else(String::new, percent),
            self.pattern.clone().unwrap_or_default(),
            self.dtypes.join(", "),
            size(self.bytes),
        ]
    }
}

fn size(bytes: usize) -> String {
    ByteSize(bytes as u64).display().si().to_string()
}

fn percent(fraction: f64) -> String {
    format!("{:.2}%", 100.0 * fraction)
}

/// A table of the places.
fn summary(places: &[Place], stacks: &[(&str, Sum)], total: &Sum) -> String {
    let heads = [
        Words(""),
        Figures("weights"),
        Figures("zeros"),
        Words("pattern"),
        Words("format"),
        Figures("size"),
    ];
    let mut rows: Vec<_> = places.iter().map(|place| place.sum.row(&place.name)).collect();
    for (stack, layers) in stacks.iter().filter(|(_, layers)| layers.weights > 0) {
        rows.push(layers.row(&match stacks {
            [_] => "all layers".to_owned(),
            _ => format!("all {stack}"),
        }));
    }
    rows.push(total.row("all tensors"));
    shorten(&heads, &mut rows);
    columns(&heads, &rows)
}

/// Leaves the ends of names that are too long beside the other columns of a page.
fn shorten(heads: &[Column], rows: &mut [Vec<String>]) {
    let width = |text: &str| text.chars().count();
    let others = heads.iter().enumerate().skip(1).map(|(i, head)| {
        let cells = rows.iter().map(|row| width(&row[i]));
        2 + cells.max().unwrap_or(0).max(width(head.heading()))
    });
    let most = WIDTH.saturating_sub(others.sum());
    for name in rows.iter_mut().map(|row| &mut row[0]) {
        let cut = width(name).saturating_sub(most);
        if cut > 0 {
            *name = format!("…{}", name.chars().skip(cut + 1).collect::<String>());
        }
    }
}

/// A table of the tensors.
fn each(tensors: &[Tensor]) -> String {
    let heads =
        [Words("tensor"), Figures("shape"), Figures("zeros"), Words("pattern"), Words("format")];
    let row = |tensor: &Tensor| {
        let shape: Vec<String> = tensor.shape.iter().map(ToString::to_string).collect();
        let zeros = tensor.zeros.map(|zeros| zeros as f64 / tensor.weights.max(1) as f64);
        vec![
            short(&tensor.name).to_owned(),
            shape.join("×"),
            zeros.map_or_else(String::new, percent),
            tensor.pattern.clone().unwrap_or_default(),
            tensor.dtype.clone(),
        ]
    };
    columns(&heads, &tensors.iter().map(row).collect::<Vec<_>>())
}
