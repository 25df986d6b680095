//! Recognises other forms of models in place of a checkpoint, and says what to do with each.

use std::{fs, path::Path};

use super::Error;

/// The error for a path that is not a checkpoint.
pub(super) fn no_checkpoint(path: &Path) -> Error {
    if !path.exists() {
        return Error::Missing(path.to_owned());
    }
    if !path.is_dir() {
        return foreign_file(path).unwrap_or_else(|| Error::NotADirectory(path.to_owned()));
    }
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(problem) => return Error::io(path, problem),
    };
    let mut names: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.file_name())).collect();
    names.sort();
    let has = |name: &str| names.iter().any(|found| *found == *name);
    if has("adapter_config.json") {
        return Error::Foreign {
            path: path.to_owned(),
            form: "an adapter, without the model that it adapts",
            todo: "merge the two first, with peft's `merge_and_unload`, and give the result",
        };
    }
    if has("snapshots") {
        return Error::Foreign {
            path: path.to_owned(),
            form: "a model's folder in the hub's cache",
            todo: "give the model's name on the hub, `owner/name`, or the folder below snapshots",
        };
    }
    let foreign = names.iter().filter(|name| !name.to_string_lossy().ends_with(".safetensors"));
    let foreign = foreign.map(|name| path.join(name)).find_map(|file| foreign_file(&file));
    foreign.unwrap_or_else(|| match has("config.json") {
        true => Error::NoWeights(path.to_owned()),
        false => Error::NoFile { dir: path.to_owned(), file: "config.json" },
    })
}

/// The error for a single file of weights; `None` if its name does not look like one.
fn foreign_file(path: &Path) -> Option<Error> {
    let (form, todo) = match path.extension()?.to_str()? {
        "bin" | "pt" | "pth" | "ckpt" => {
            let dir = path.parent().unwrap_or(Path::new("")).to_owned();
            let file = path.file_name()?.to_string_lossy().into_owned();
            return Some(Error::Pickle { dir, file });
        }
        "gguf" => (
            "a GGUF file, the form that llama.cpp runs",
            "give the model that it was made from: a directory in the Hugging Face layout, or \
             `owner/name` on the hub",
        ),
        "onnx" | "h5" | "msgpack" => (
            "a model of another framework",
            "give the same model with safetensors, a directory in the Hugging Face layout",
        ),
        "safetensors" => (
            "a single file of weights",
            "give the directory that holds it, with config.json and tokenizer.json",
        ),
        _ => return None,
    };
    Some(Error::Foreign { path: path.to_owned(), form, todo })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_form_of_a_model_has_its_advice() {
        let dir = tempfile::tempdir().unwrap();
        let with = |files: &[&str]| {
            let dir = tempfile::tempdir_in(&dir).unwrap().keep();
            files.iter().for_each(|file| fs::write(dir.join(file), "").unwrap());
            dir
        };
        for (files, expected) in [
            (&["config.json", "pytorch_model.bin"][..], "pickle (pytorch_model.bin)"),
            (&["consolidated.00.pth", "params.json"], "pickle (consolidated.00.pth)"),
            (&["a.txt", "m-Q4_K_M.gguf"], "m-Q4_K_M.gguf is a GGUF file"),
            (&["adapter_config.json", "adapter_model.safetensors"], "merge_and_unload"),
            (&["config.json", "flax_model.msgpack"], "another framework"),
            (&["model.safetensors"], "has no config.json"),
            (&["config.json"], "has no weights"),
            (&[], "has no config.json"),
        ] {
            let found = no_checkpoint(&with(files)).to_string();
            assert!(found.contains(expected), "{files:?}: {found}");
        }
        let file = |name: &str| no_checkpoint(&with(&[name]).join(name)).to_string();
        assert!(file("m.gguf").contains("give the model that it was made from"));
        assert!(file("model.pt").contains("can run code"));
        assert!(file("model.safetensors").contains("give the directory that holds it"));
        assert!(file("recipe.toml").contains("is not a directory"));
        let cache = with(&[]);
        fs::create_dir(cache.join("snapshots")).unwrap();
        assert!(no_checkpoint(&cache).to_string().contains("`owner/name`"));
        assert!(no_checkpoint(&cache.join("none")).to_string().contains("does not exist"));
    }
}
