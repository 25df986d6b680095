//! Reads a checkpoint: its configuration, and its weights from memory-mapped shards.

mod quantised;
mod stacked;

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt, fs,
    marker::PhantomData,
    ops::Range,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use barber_metric::Dims;
use bytesize::ByteSize;
use memmap2::Mmap;
use safetensors::{
    SafeTensors,
    tensor::{Metadata, TensorInfo},
};
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};
use serde_json::Value;

use super::{
    Cut, Dtype, Error, check_inside,
    foreign::no_checkpoint,
    layout::{self, Compressed, Format, Packing, SHAPE, VALUES},
    owned::{CARD, HTML, JSON, RECIPE},
    quantised::{self as quantisation, Matrix, Quantisation, Unread},
    transposed::transposed,
};
use crate::{
    buffer::recycle,
    files,
    limits::{self, HEADERS, Limit},
    simd::first,
};

/// A checkpoint directory, validated and mapped.
#[derive(Clone, Debug)]
pub struct Reader {
    dir: PathBuf,
    config: Value,
    shards: Vec<Shard>,
    /// The place of each tensor.
    tensors: BTreeMap<String, Place>,
    /// The order in which rows or columns of tensors are read.
    orders: Orders,
    indexed: bool,
    quantisation: Result<Option<Quantisation>, Unread>,
}

/// The order in which rows or columns of tensors are read, by tensor name: each is there once.
pub type Orders = BTreeMap<String, Cut>;

/// The place of a tensor.
#[derive(Clone, Debug)]
enum Place {
    /// In the shard of this index.
    Stored(usize),
    /// A compressed matrix, in several tensors.
    Compressed {
        packing: &'static Packing,
        shape: [usize; 2],
        dtype: Dtype,
        values: Span,
        index: Span,
        stored: usize,
    },
    /// A quantised matrix, in several tensors.
    Quantised { matrix: Matrix, shape: [usize; 2], codes: Span, scales: Span, stored: usize },
    /// A matrix, or a bias, of the stored tensor of this name, which has one of each expert; with
    /// the shape of the matrix if it is stored transposed.
    Stacked { stack: String, shard: usize, index: usize, turned: Option<[usize; 2]> },
}

/// The place of a tensor's bytes: the shard, and start and end in its data.
#[derive(Clone, Copy, Debug)]
struct Span(usize, (usize, usize));

#[derive(Clone, Debug)]
pub(super) struct Shard {
    pub(super) path: PathBuf,
    pub(super) header: Metadata,
    /// Offset of the tensors, after the header.
    data: usize,
    map: Arc<Mmap>,
}

/// A tensor of a checkpoint.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Name of the tensor.
    pub name: &'a str,
    /// Format of the elements.
    pub dtype: safetensors::Dtype,
    /// Shape of the tensor.
    pub shape: &'a [usize],
    /// File of the tensor.
    pub file: &'a Path,
    /// Bytes in the checkpoint; for a compressed or quantised matrix, those of all its tensors.
    pub stored: usize,
    /// The stored tensor that the matrix is a part of, if experts are stored stacked.
    pub(super) stack: Option<Stack<'a>>,
    data: Data<'a>,
    /// The order in which rows or columns are read, if it is not that of the file.
    order: Option<&'a Cut>,
}

/// A stored tensor with one matrix of each expert.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stack<'a> {
    /// Name of the tensor.
    pub(super) name: &'a str,
    /// Shape of the tensor.
    pub(super) shape: &'a [usize],
}

/// A tensor in mapped files, whose values are finite.
#[derive(Clone, Debug)]
pub struct Mapped {
    data: MappedData,
    /// The tensor's shape and the order of its rows or columns, if it is not that of the file.
    order: Option<(Vec<usize>, Cut)>,
}

#[derive(Clone, Debug)]
enum MappedData {
    /// With the numbers of rows and columns of the file's matrix, if the tensor is its transpose.
    Dense {
        bytes: MappedBytes,
        dtype: Dtype,
        stored: Option<(usize, usize)>,
    },
    Quantised {
        matrix: Matrix,
        codes: MappedBytes,
        scales: MappedBytes,
    },
}

/// Bytes of a mapped file.
#[derive(Clone)]
struct MappedBytes {
    map: Arc<Mmap>,
    range: Range<usize>,
}

impl Mapped {
    /// The values, row-major.
    pub fn values(&self) -> Vec<f32> {
        let values = match &self.data {
            MappedData::Dense { bytes, dtype, stored: None } => dtype.decode(bytes.get()),
            MappedData::Dense { bytes, dtype, stored: Some(dims) } => {
                dtype.decode(&transposed(bytes.get(), *dims))
            }
            MappedData::Quantised { matrix, codes, scales } => {
                matrix.values(quantisation::Stored { codes: codes.get(), scales: scales.get() })
            }
        };
        match &self.order {
            Some((shape, order)) => order.left(shape, &values),
            None => values,
        }
    }
}

impl MappedBytes {
    fn get(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }
}

impl fmt::Debug for MappedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MappedBytes").field("range", &self.range).finish_non_exhaustive()
    }
}

/// The stored data of a tensor.
#[derive(Clone, Copy, Debug)]
enum Data<'a> {
    Dense(&'a [u8]),
    /// The columns of a matrix, one after the other.
    Transposed(&'a [u8]),
    Compressed(Compressed<'a>),
    Quantised(Matrix, quantisation::Stored<'a>),
}

impl<'a> TensorView<'a> {
    /// A tensor that is not compressed.
    pub(super) const fn dense(
        name: &'a str,
        dtype: safetensors::Dtype,
        shape: &'a [usize],
        file: &'a Path,
        bytes: &'a [u8],
    ) -> Self {
        let (stored, data) = (bytes.len(), Data::Dense(bytes));
        Self { name, dtype, shape, file, stored, stack: None, data, order: None }
    }

    /// The bytes, little-endian, row-major, in the reader's order of rows and columns: those of the
    /// file, or of the matrix that is compressed, quantised or transposed there.
    ///
    /// # Errors
    /// If the tensor is compressed and damaged.
    pub fn bytes(&self) -> Result<Cow<'a, [u8]>, Error> {
        let bytes = self.bytes_in_file_order()?;
        Ok(match self.order {
            Some(order) => order.left(self.shape, &bytes).into(),
            None => bytes,
        })
    }

    fn bytes_in_file_order(&self) -> Result<Cow<'a, [u8]>, Error> {
        match self.data {
            Data::Dense(bytes) => Ok(bytes.into()),
            Data::Transposed(bytes) => match self.shape {
                &[rows, columns] => Ok(transposed(bytes, (columns, rows)).into()),
                _ => Ok(bytes.into()),
            },
            Data::Compressed(compressed) => {
                let damaged = |problem| Error::compressed(self.file, self.name, problem);
                compressed.dense().map(Cow::Owned).map_err(damaged)
            }
            Data::Quantised(matrix, stored) => Ok(matrix.bytes(stored).into()),
        }
    }

    /// The values as `dtype`, which is the tensor's.
    fn values(&self, dtype: Dtype) -> Result<Vec<f32>, Error> {
        match self.data {
            Data::Quantised(matrix, stored) => {
                let values = matrix.values(stored);
                Ok(match self.order {
                    Some(order) => order.left(self.shape, &values),
                    None => values,
                })
            }
            Data::Dense(_) | Data::Transposed(_) | Data::Compressed(_) => {
                Ok(dtype.decode(&self.bytes()?))
            }
        }
    }

    /// The bytes of the file for the matrix's `bytes`, row-major.
    pub(super) fn as_stored<'b>(&self, bytes: Cow<'b, [u8]>) -> Cow<'b, [u8]> {
        match (self.data, self.shape) {
            (Data::Transposed(_), &[rows, columns]) => transposed(&bytes, (rows, columns)).into(),
            _ => bytes,
        }
    }

    /// Whether the file has the matrix's columns one after the other.
    pub(super) const fn is_transposed(&self) -> bool {
        matches!(self.data, Data::Transposed(_))
    }

    /// Number of values that are NaN or infinite; 0 for formats that Barber does not read.
    ///
    /// # Errors
    /// If it is compressed and damaged.
    pub fn not_finite(&self) -> Result<usize, Error> {
        let Some(dtype) = Dtype::of(self.dtype) else { return Ok(0) };
        Ok(dtype.not_finite(&self.bytes()?).0)
    }

    /// Number of [`bytes`](Self::bytes); for a compressed or quantised matrix more than
    /// [`stored`](Self::stored).
    pub fn length(&self) -> usize {
        layout::length(self.dtype, self.shape)
    }
}

/// The header of a safetensors file and the offset of its first tensor.
///
/// # Errors
/// If the header is wrong: a length beyond the file, invalid JSON, tensors that overlap, leave gaps
/// or have sizes that contradict their shapes, or two tensors with the same name.
pub fn parse_header(bytes: &[u8]) -> Result<(usize, Metadata), String> {
    let (length, header) = SafeTensors::read_metadata(bytes).map_err(|e| e.to_string())?;
    let Pairs(tensors) = serde_json::from_slice::<Pairs<IgnoredAny>>(&bytes[8..length + 8])
        .map_err(|e| e.to_string())?;
    match repeated(tensors.iter().map(|(name, _)| name.as_str()).collect()) {
        Some(name) => Err(format!("there are two tensors `{name}`")),
        None => Ok((length + 8, header)),
    }
}

/// The tensors in each file of an index of shards.
///
/// # Errors
/// If the index is wrong: invalid JSON, no map, a tensor that is listed twice, or the name of a
/// file that is not a safetensors file of the same directory.
pub fn parse_index(bytes: &[u8]) -> Result<BTreeMap<String, Vec<String>>, String> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: Option<Pairs<String>>,
    }
    let index: Index =
        serde_json::from_slice(bytes).map_err(|e| format!("not an index of shards: {e}"))?;
    let Pairs(pairs) =
        index.weight_map.ok_or("has no `weight_map` of tensor names to file names")?;
    if let Some(name) = repeated(pairs.iter().map(|(name, _)| name.as_str()).collect()) {
        return Err(format!("tensor `{name}` is listed twice"));
    }
    let mut files: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, file) in pairs {
        let mut parts = Path::new(&file).components();
        let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(name)), None) if name == &*file);
        if !plain || !file.ends_with(".safetensors") {
            return Err(format!(
                "tensor `{tensor}`: must name a safetensors file of the same directory, not {file:?}"
            ));
        }
        files.entry(file).or_default().push(tensor);
    }
    Ok(files)
}

/// The keys and values of a JSON object, repeated keys included.
struct Pairs<T>(Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Pairs<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct All<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for All<T> {
            type Value = Pairs<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs<T>, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }

        deserializer.deserialize_map(All(PhantomData))
    }
}

/// A name that occurs more than once.
fn repeated(mut names: Vec<&str>) -> Option<&str> {
    names.sort_unstable();
    names.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0])
}

impl Shard {
    /// Opens a file whose header may have at most `most` bytes.
    pub(super) fn open(path: PathBuf, most: u64) -> Result<Self, Error> {
        let file = files::open(&path).map_err(|e| Error::io(&path, e))?;
        let found = file.metadata().map_err(|e| Error::io(&path, e))?.len();
        if found < 8 {
            return Err(Error::Truncated { path, promised: 8, found });
        }
        #[allow(unsafe_code, reason = "memory-mapping is unsafe: another process may write")]
        // SAFETY: the map is only read, as bytes, and every offset into it is checked against its
        // length. A checkpoint that another process changes meanwhile gives wrong numbers, as it
        // would when read; one that is cut short ends the process, as for every memory-mapping
        // tool.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(&path, e))?;
        let mut length = [0; 8];
        length.copy_from_slice(&map[..8]);
        let length = u64::from_le_bytes(length);
        if length > most && length < found {
            let (length, all) = (ByteSize(length), ByteSize(HEADERS));
            let problem =
                format!("it has {length}; all headers of a checkpoint together may have {all}");
            return Err(Error::Header { path, problem });
        }
        let (data, header) = match parse_header(&map) {
            Ok(parsed) => parsed,
            Err(problem) => {
                // A plausible header that extends beyond the end of the file, or whose tensors do.
                let end = length.saturating_add(8);
                let tensors = usize::try_from(end)
                    .ok()
                    .and_then(|end| map.get(8..end))
                    .and_then(promised_bytes)
                    .map(|tensors| end.saturating_add(tensors));
                return Err(match tensors {
                    Some(promised) if promised > found => {
                        Error::Truncated { path, promised, found }
                    }
                    None if end > found && length < 100_000_000 => {
                        Error::Truncated { path, promised: end, found }
                    }
                    _ => Error::Header { path, problem },
                });
            }
        };
        Ok(Self { path, header, data, map: Arc::new(map) })
    }

    pub(super) fn bytes(&self, (start, end): (usize, usize)) -> &[u8] {
        &self.map[self.data + start..self.data + end]
    }

    fn mapped(&self, (start, end): (usize, usize)) -> MappedBytes {
        MappedBytes { map: self.map.clone(), range: self.data + start..self.data + end }
    }
}

/// The end of the last tensor of a header.
fn promised_bytes(header: &[u8]) -> Option<u64> {
    #[derive(Deserialize)]
    struct Extent {
        data_offsets: Option<(u64, u64)>,
    }
    let Pairs(header) = serde_json::from_slice::<Pairs<Extent>>(header).ok()?;
    header.into_iter().filter_map(|(_, tensor)| Some(tensor.data_offsets?.1)).max()
}

/// Reads a whole file of the checkpoint in `dir`.
fn read(dir: &Path, path: &Path, limit: Limit) -> Result<Vec<u8>, Error> {
    check_inside(dir, path)?;
    limits::read(path, limit).map_err(|e| Error::io(path, e))
}

/// Endings of weight files of other tools, which are neither read nor copied.
const OTHER_WEIGHTS: &[&str] =
    &["safetensors", "bin", "pt", "pth", "ckpt", "h5", "msgpack", "onnx", "gguf", "ot"];
pub(super) const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// The files about the run that made a checkpoint, which the next run writes anew.
const ABOUT_RUN: [&str; 3] = [RECIPE, JSON, HTML];

/// The `config.json` of a checkpoint directory.
fn config(dir: &Path) -> Result<Value, Error> {
    let config = dir.join("config.json");
    if !config.exists() {
        return Err(no_checkpoint(dir));
    }
    let bytes = read(dir, &config, limits::CONFIG)?;
    serde_json::from_slice(&bytes).map_err(|e| Error::Json { path: config, problem: e.to_string() })
}

/// The `config.json` of a directory whose weights may be missing.
///
/// # Errors
/// If it cannot be read, or describes weights that are quantised in a way that Barber does not read.
pub fn readable_config(dir: &Path) -> Result<Value, Error> {
    let config = config(dir)?;
    quantisation::declared(&config).map_err(|unread| Error::quantisation(dir, &unread))?;
    Ok(config)
}

impl Reader {
    /// Opens a checkpoint directory.
    ///
    /// # Errors
    /// If a required file or tensor is missing or damaged.
    pub fn open(dir: &Path) -> Result<Self, Error> {
        let config = config(dir)?;
        // As in transformers, an index beside model.safetensors is ignored.
        let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
        let mut reader = Self {
            dir: dir.to_owned(),
            config,
            shards: Vec::new(),
            tensors: BTreeMap::new(),
            orders: Orders::new(),
            indexed: !single.exists() && index.exists(),
            quantisation: Ok(None),
        };
        reader.quantisation = quantisation::declared(&reader.config);
        if reader.indexed {
            reader.open_index(index)?;
        } else if single.exists() {
            reader.add(single)?;
        } else {
            return Err(no_checkpoint(dir));
        }
        if let Some(packing) = layout::declared(&reader.config).and_then(Format::packing) {
            reader.find_compressed(packing)?;
        }
        if let Ok(Some(of)) = reader.quantisation.clone() {
            reader.find_quantised(&of)?;
        }
        reader.find_stacked()?;
        Ok(reader)
    }

    fn open_index(&mut self, path: PathBuf) -> Result<(), Error> {
        let wrong = |problem: String| Error::Index { path: path.clone(), problem };
        let bytes = read(&self.dir, &path, limits::INDEX)?;
        for (file, tensors) in parse_index(&bytes).map_err(wrong)? {
            let shard = self.dir.join(&file);
            if !shard.exists() {
                return Err(wrong(format!("names the shard {file}, which does not exist")));
            }
            let shard = self.add(shard)?;
            for name in tensors {
                if shard.header.info(&name).is_none() {
                    return Err(Error::NotInShard { path: shard.path.clone(), name });
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, path: PathBuf) -> Result<&Shard, Error> {
        check_inside(&self.dir, &path)?;
        let known: u64 = self.shards.iter().map(|shard| shard.data as u64).sum();
        let shard = Shard::open(path, HEADERS.saturating_sub(known))?;
        for name in shard.header.tensors().into_keys() {
            let place = Place::Stored(self.shards.len());
            if let Some(Place::Stored(other)) = self.tensors.insert(name.clone(), place) {
                let other = self.shards[other].path.display();
                return Err(Error::Header {
                    problem: format!("tensor `{name}` is also in {other}"),
                    path: shard.path,
                });
            }
        }
        self.shards.push(shard);
        Ok(&self.shards[self.shards.len() - 1])
    }

    /// Replaces the tensors of each compressed matrix by the matrix.
    fn find_compressed(&mut self, packing: &'static Packing) -> Result<(), Error> {
        let suffix = layout::tensor("", packing.index);
        let modules = self.tensors.keys().filter_map(|name| name.strip_suffix(&suffix));
        for module in modules.map(str::to_owned).collect::<Vec<_>>() {
            let name = layout::matrix(&module);
            let place = self.compressed(packing, &module, &name)?;
            for part in packing.tensors {
                self.tensors.remove(&layout::tensor(&module, part));
            }
            if self.tensors.insert(name.clone(), place).is_some() {
                return Err(Error::compressed(
                    &self.dir,
                    &name,
                    "the file has it as a dense tensor, too",
                ));
            }
        }
        Ok(())
    }

    /// The place, shape and format of a compressed matrix.
    fn compressed(
        &self,
        packing: &'static Packing,
        module: &str,
        name: &str,
    ) -> Result<Place, Error> {
        let find = |part: &str| {
            let part = layout::tensor(module, part);
            let Some(Place::Stored(shard)) = self.tensors.get(&part) else { return None };
            self.shards[*shard].header.info(&part).map(|info| (*shard, info))
        };
        let part = |part: &str| {
            let missing = || format!("there is no `{}`", layout::tensor(module, part));
            find(part).ok_or_else(|| Error::compressed(&self.dir, name, missing()))
        };
        let (in_shard, shape) = part(SHAPE)?;
        let shape = layout::shape(shape.dtype, self.shards[in_shard].bytes(shape.data_offsets));
        let (in_shard, values) = part(VALUES)?;
        let path = &self.shards[in_shard].path;
        let shape = shape.ok_or_else(|| {
            Error::compressed(
                path,
                name,
                format!("`{}` is not the shape of a matrix", layout::tensor(module, SHAPE)),
            )
        })?;
        let dtype = Dtype::of(values.dtype).ok_or_else(|| {
            let dtype = format!("{:?}", values.dtype);
            Error::Dtype { path: path.clone(), name: name.into(), dtype }
        })?;
        let values = Span(in_shard, values.data_offsets);
        let (in_shard, index) = part(packing.index)?;
        let index = Span(in_shard, index.data_offsets);
        let parts = packing.tensors.iter().filter_map(|part| find(part));
        let stored = parts.map(|(_, info)| info.data_offsets.1 - info.data_offsets.0).sum();
        Ok(Place::Compressed { packing, shape, dtype, values, index, stored })
    }

    /// The same checkpoint with rows or columns of tensors in another order.
    #[must_use]
    pub fn reordered(&self, orders: Orders) -> Self {
        Self { orders, ..self.clone() }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// `config.json`.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The names of all tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The files that hold weights.
    pub fn weight_files(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|shard| shard.path.as_path())
    }

    /// Number of weights of all matrices, embeddings and zeros included, without norms and biases.
    pub fn weights(&self) -> usize {
        let tensors = self.tensors.iter().filter_map(|(name, place)| self.view(name, place));
        let matrices = tensors.filter(|tensor| tensor.shape.len() > 1);
        matrices.map(|matrix| matrix.shape.iter().product::<usize>()).sum()
    }

    /// Stored bytes of all tensors.
    pub fn weight_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| (shard.map.len() - shard.data) as u64).sum()
    }

    /// Bytes of all weight files and of the files that are copied to a pruned checkpoint, without
    /// the card, which is replaced.
    ///
    /// # Errors
    /// If the size of a file cannot be read.
    pub fn directory_bytes(&self) -> Result<u64, Error> {
        let index = self.indexed.then(|| self.dir.join(INDEX));
        sizes(self.weight_files().map(Path::to_owned).chain(self.companions()?).chain(index))
    }

    /// The quantisation that is undone when matrices are read; `None` if the weights are not
    /// quantised.
    ///
    /// # Errors
    /// If the weights are quantised in a way that Barber does not read.
    pub fn quantisation(&self) -> Result<Option<&Quantisation>, Error> {
        match &self.quantisation {
            Ok(found) => Ok(found.as_ref()),
            Err(unread) => Err(Error::quantisation(&self.dir, unread)),
        }
    }

    /// Number of compressed matrices.
    pub fn compressed_matrices(&self) -> usize {
        let compressed = |place: &&Place| matches!(place, Place::Compressed { .. });
        self.tensors.values().filter(compressed).count()
    }

    pub(super) fn shards(&self) -> &[Shard] {
        &self.shards
    }

    pub(super) fn is_indexed(&self) -> bool {
        self.indexed
    }

    /// The format of pruned matrices that `config.json` declares.
    pub fn format(&self) -> Format {
        layout::declared(&self.config).unwrap_or_default()
    }

    /// The tensor of this name.
    ///
    /// # Errors
    /// If it does not exist.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, Error> {
        let found = self.tensors.get_key_value(name);
        found
            .and_then(|(name, place)| self.view(name, place))
            .ok_or_else(|| Error::NoTensor { dir: self.dir.clone(), name: name.into() })
    }

    fn view<'a>(&'a self, name: &'a str, place: &'a Place) -> Option<TensorView<'a>> {
        let bytes = |Span(shard, offsets): Span| self.shards[shard].bytes(offsets);
        let view = match place {
            Place::Stored(shard) => {
                let info = self.shards[*shard].header.info(name)?;
                let bytes = bytes(Span(*shard, info.data_offsets));
                let file = &self.shards[*shard].path;
                TensorView::dense(name, info.dtype, &info.shape, file, bytes)
            }
            Place::Stacked { stack, shard, index, turned } => {
                let info = self.shards[*shard].header.info(stack)?;
                let bytes = bytes(part(*shard, info, *index));
                let file = &self.shards[*shard].path;
                let stack = Some(Stack { name: stack, shape: &info.shape });
                let matrix = match turned {
                    Some(shape) => &shape[..],
                    None => info.shape.get(1..)?,
                };
                let view = TensorView::dense(name, info.dtype, matrix, file, bytes);
                let data = if turned.is_some() { Data::Transposed(bytes) } else { view.data };
                TensorView { stack, data, ..view }
            }
            Place::Compressed { packing, shape, dtype, values, index, stored } => TensorView {
                name,
                dtype: dtype.stored(),
                shape,
                file: &self.shards[values.0].path,
                stored: *stored,
                stack: None,
                order: None,
                data: Data::Compressed(Compressed {
                    packing,
                    dims: Dims { rows: shape[0], columns: shape[1] },
                    size: dtype.size(),
                    index: bytes(*index),
                    values: bytes(*values),
                }),
            },
            Place::Quantised { matrix, shape, codes, scales, stored } => TensorView {
                name,
                dtype: matrix.dtype.stored(),
                shape,
                file: &self.shards[codes.0].path,
                stored: *stored,
                stack: None,
                order: None,
                data: Data::Quantised(
                    *matrix,
                    quantisation::Stored { codes: bytes(*codes), scales: bytes(*scales) },
                ),
            },
        };
        Some(TensorView { order: self.orders.get(name), ..view })
    }

    /// The tensors of a shard, in the order of their bytes; a compressed matrix is at the place of
    /// its values, a quantised one at that of its codes.
    pub(super) fn in_shard(&self, shard: usize) -> Vec<TensorView<'_>> {
        let mut tensors: Vec<_> = self
            .tensors
            .iter()
            .filter_map(|(name, place)| {
                let Span(of, offsets) = match place {
                    Place::Compressed { values, .. } => *values,
                    Place::Quantised { codes, .. } => *codes,
                    stored => self.span(name, stored)?,
                };
                (of == shard).then_some((offsets, self.view(name, place)?))
            })
            .collect();
        tensors.sort_by_key(|(offsets, _)| *offsets);
        tensors.into_iter().map(|(_, tensor)| tensor).collect()
    }

    /// A tensor of this shape in a floating-point format.
    fn floats(&self, name: &str, shape: &[usize]) -> Result<(Dtype, TensorView<'_>), Error> {
        let view = self.tensor(name)?;
        let (path, name) = (view.file.to_owned(), name.to_owned());
        if view.shape != shape {
            let (found, expected) = (view.shape.to_vec(), shape.to_vec());
            return Err(Error::Shape { path, name, found, expected });
        }
        match Dtype::of(view.dtype) {
            Some(dtype) => Ok((dtype, view)),
            None => Err(Error::Dtype { path, name, dtype: format!("{:?}", view.dtype) }),
        }
    }

    /// Checks that a tensor has this shape and a format that can be computed with.
    ///
    /// # Errors
    /// If it is missing, or has another shape or an unsupported format.
    pub fn check(&self, name: &str, shape: &[usize]) -> Result<(), Error> {
        self.floats(name, shape).map(drop)
    }

    /// Checks that a tensor's values are finite, if they are in a format that Barber reads.
    ///
    /// # Errors
    /// If it is missing or damaged, or a value is NaN or infinite.
    pub fn check_finite(&self, name: &str) -> Result<(), Error> {
        let view = self.tensor(name)?;
        let Some(dtype) = Dtype::of(view.dtype) else { return Ok(()) };
        if let Data::Quantised(..) = view.data {
            return self.read(name, view.shape).map(recycle);
        }
        let bytes = view.bytes()?;
        match dtype.not_finite(&bytes) {
            (_, None) => Ok(()),
            (_, Some(at)) => {
                let value = dtype.decode(&bytes[at * dtype.size()..][..dtype.size()])[0];
                let (path, name) = (view.file.to_owned(), name.to_owned());
                Err(Error::NotFinite { path, name, value, index: unravel(at, view.shape) })
            }
        }
    }

    /// A tensor's values, row-major.
    ///
    /// # Errors
    /// As [`Reader::check`], and if a value is NaN or infinite.
    pub fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let (dtype, view) = self.floats(name, shape)?;
        let values = view.values(dtype)?;
        finite(&values, |at| (view.file, name, unravel(at, shape)))?;
        Ok(values)
    }

    /// A tensor whose values can be read without the reader, again and again; `None` if it is
    /// compressed.
    ///
    /// # Errors
    /// As [`Reader::check`], and if a value is NaN or infinite.
    pub fn mapped(&self, name: &str, shape: &[usize]) -> Result<Option<Mapped>, Error> {
        let (dtype, view) = self.floats(name, shape)?;
        let stored = match (view.data, shape) {
            (Data::Transposed(_), &[rows, columns]) => Some((columns, rows)),
            _ => None,
        };
        let bytes = |Span(shard, offsets): Span| self.shards[shard].mapped(offsets);
        let mapped = match self.tensors.get(name) {
            Some(Place::Quantised { matrix, codes, scales, .. }) => MappedData::Quantised {
                matrix: *matrix,
                codes: bytes(*codes),
                scales: bytes(*scales),
            },
            of => match of.and_then(|of| self.span(name, of)) {
                Some(span) => MappedData::Dense { bytes: bytes(span), dtype, stored },
                None => return Ok(None),
            },
        };
        self.check_finite(name)?;
        let order = view.order.map(|order| (shape.to_vec(), order.clone()));
        Ok(Some(Mapped { data: mapped, order }))
    }

    /// The place of the bytes of a tensor that is neither compressed nor quantised.
    fn span(&self, name: &str, place: &Place) -> Option<Span> {
        let of = |shard: usize, name: &str| self.shards[shard].header.info(name);
        Some(match place {
            Place::Stored(shard) => Span(*shard, of(*shard, name)?.data_offsets),
            Place::Stacked { stack, shard, index, .. } => part(*shard, of(*shard, stack)?, *index),
            Place::Compressed { .. } | Place::Quantised { .. } => return None,
        })
    }

    /// Some rows of a matrix, such as the embeddings of a few tokens; the rows must exist.
    ///
    /// # Errors
    /// As [`Reader::read`].
    pub fn read_rows(
        &self,
        name: &str,
        shape: [usize; 2],
        rows: impl IntoIterator<Item = usize>,
    ) -> Result<Vec<f32>, Error> {
        let (dtype, view) = self.floats(name, &shape)?;
        let width = shape[1] * dtype.size();
        let bytes = view.bytes()?;
        let mut values = Vec::new();
        for row in rows {
            let decoded = dtype.decode(&bytes[row * width..(row + 1) * width]);
            finite(&decoded, |at| (view.file, name, vec![row, at]))?;
            values.extend(decoded);
        }
        Ok(values)
    }

    /// The files that are copied to a pruned checkpoint, such as tokenizer, configuration and
    /// licence: all at the top of the directory except weights, hidden files, and those about the
    /// run that made it.
    ///
    /// # Errors
    /// If the directory cannot be listed, or a link leads out of it.
    pub fn companions(&self) -> Result<Vec<PathBuf>, Error> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(|e| Error::io(&self.dir, e))? {
            let path = entry.map_err(|e| Error::io(&self.dir, e))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let weights = extension(&path).is_some_and(|e| OTHER_WEIGHTS.contains(&e))
                || name.ends_with(".index.json");
            let other = weights || name.starts_with('.') || ABOUT_RUN.contains(&name);
            if path.exists() && !path.is_dir() && !other {
                check_inside(&self.dir, &path)?;
                files.push(path);
            }
        }
        files.sort();
        Ok(files)
    }
}

/// The place of the matrix of this index in a stacked tensor.
fn part(shard: usize, stack: &TensorInfo, index: usize) -> Span {
    let (start, end) = stack.data_offsets;
    let size = (end - start) / stack.shape.first().copied().unwrap_or(1).max(1);
    Span(shard, (start + index * size, start + (index + 1) * size))
}

/// Bytes of some files, without those that Barber adds about a run, and without the card.
pub(crate) fn sizes(files: impl Iterator<Item = PathBuf>) -> Result<u64, Error> {
    let mut all = 0;
    let added = |file: &PathBuf| {
        let name = file.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name == CARD || ABOUT_RUN.contains(&name))
    };
    for file in files.filter(|file| !added(file)) {
        all += fs::metadata(&file).map_err(|e| Error::io(&file, e))?.len();
    }
    Ok(all)
}

fn extension(path: &Path) -> Option<&str> {
    path.extension()?.to_str()
}

fn finite<'a>(
    values: &[f32],
    place: impl FnOnce(usize) -> (&'a Path, &'a str, Vec<usize>),
) -> Result<(), Error> {
    match first(values, |value| !value.is_finite()) {
        None => Ok(()),
        Some(at) => {
            let (path, name, index) = place(at);
            let (path, name) = (path.to_owned(), name.to_owned());
            Err(Error::NotFinite { path, name, value: values[at], index })
        }
    }
}

/// The index of element `at` of a tensor of this shape, row-major.
pub(crate) fn unravel(mut at: usize, shape: &[usize]) -> Vec<usize> {
    let mut index: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&size| {
            let i = at % size;
            at /= size;
            i
        })
        .collect();
    index.reverse();
    index
}
