//! The catalogue of public checkpoints: which names `create --catalog` knows, where they come from, on which terms.
//!
//! One is built in ([`BUILT_IN`], the platform's own list); the operator's file takes its place as a whole. It is read once, at the start,
//! and nothing of it is kept anywhere else: the record of a checkpoint made from it holds the source, and its terms are found by that
//! source each time it is shown. So a checkpoint made before a change of the catalogue has the terms of the present one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde::Deserialize;

use super::wire;
use crate::catalog::checkpoints::{Origin, Record};
use crate::error::{Error, Result};
use crate::names::CheckpointName;
use crate::source::{SourceKind, check_options, check_uri, split_user_information};

/// The platform's public checkpoints.
const BUILT_IN: &str = include_str!("catalogue.toml");

/// Likeness (Jaro-Winkler, 0 to 1) from which a name may have been meant; below it suggestions only puzzle.
const LIKENESS: f64 = 0.75;

/// Names that are suggested at most.
const SUGGESTIONS: usize = 3;

/// Public checkpoints by name: see the module's page.
#[derive(Clone, Debug)]
pub struct Catalogue(Vec<Offer>);

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Offer {
    name: String,
    r#type: String,
    uri: String,
    #[serde(default)]
    options: BTreeMap<String, String>,
    terms: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default)]
    checkpoint: Vec<Offer>,
}

impl Catalogue {
    /// The operator's file, or the one that is built in.
    ///
    /// # Errors
    /// The file cannot be read; `BAD_CATALOGUE` with what is wrong.
    pub fn open(file: Option<&Path>) -> Result<Self> {
        let Some(path) = file else { return Self::parse(BUILT_IN) };
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::io("reading the catalogue", path, error).remedy("mend the key `catalogue.file`"))?;
        Self::parse(&text).map_err(|error| error.during(format!("reading the catalogue {}", path.display())))
    }

    fn parse(text: &str) -> Result<Self> {
        let bad = |what: String| Error::invalid("BAD_CATALOGUE", what).remedy("mend the file of `catalogue.file`");
        let document: Document = toml::from_str(text).map_err(|error| bad(error.to_string()))?;
        let mut names = BTreeSet::new();
        for offer in &document.checkpoint {
            let about = |error: Error| bad(format!("the checkpoint `{}`: {}", offer.name, error.chain()));
            offer.check().map_err(about)?;
            if !names.insert(&offer.name) {
                return Err(bad(format!("the name `{}` is there twice", offer.name)));
            }
        }
        Ok(Self(document.checkpoint))
    }

    /// Where the checkpoint `name` comes from.
    ///
    /// # Errors
    /// `NOT_IN_CATALOGUE` with names like it.
    pub(super) fn origin(&self, name: &str) -> Result<Origin> {
        self.0.iter().find(|offer| offer.name == name).map(Offer::origin).ok_or_else(|| {
            let near = self.near(name);
            let error = Error::not_found("NOT_IN_CATALOGUE", format!("the catalogue has no checkpoint `{name}`"));
            match near.as_slice() {
                [] => error.remedy("`ckptctl catalog` shows what there is"),
                near => error.fact("near", near.join(",")).remedy(format!("did you mean {}?", near.join(", "))),
            }
        })
    }

    fn near(&self, name: &str) -> Vec<&str> {
        let likeness = |offer: &Offer| strsim::jaro_winkler(&offer.name, name);
        let mut near: Vec<_> = self.0.iter().map(|offer| (likeness(offer), offer.name.as_str())).collect();
        near.retain(|(likeness, _)| *likeness >= LIKENESS);
        near.sort_by(|(a, _), (b, _)| b.total_cmp(a));
        near.into_iter().map(|(_, name)| name).take(SUGGESTIONS).collect()
    }

    /// The terms that attaching `record` accepts, if it is a public checkpoint of a source in the catalogue.
    pub(super) fn terms(&self, record: &Record) -> Option<String> {
        let ours = |offer: &&Offer| offer.r#type == record.origin.kind && offer.uri == record.origin.uri;
        let same_branch = |offer: &&Offer| offer.options.get("branch") == record.origin.options.get("branch");
        let mut offers = self.0.iter().filter(ours);
        let offer = offers.clone().find(same_branch).or_else(|| offers.next()).filter(|_| record.public)?;
        Some(format!("{}: {}", record.name, offer.terms))
    }

    /// Everything, as messages.
    pub(super) fn entries(&self) -> Vec<wire::CatalogEntry> {
        let entry = |offer: &Offer| wire::CatalogEntry {
            name: offer.name.clone(),
            source: Some(wire::Source {
                r#type: offer.r#type.clone(),
                uri: offer.uri.clone(),
                options: offer.options.clone().into_iter().collect(),
            }),
            terms_url: offer.terms.clone(),
        };
        self.0.iter().map(entry).collect()
    }
}

impl Offer {
    fn check(&self) -> Result<()> {
        CheckpointName::new(self.name.clone())?;
        let kind: SourceKind = self.r#type.parse()?;
        check_uri(kind, &self.uri)?;
        check_options(&self.options)?;
        if matches!(kind, SourceKind::Directory | SourceKind::Upload) || split_user_information(&self.uri).1.is_some() {
            return Err(Error::invalid("BAD_CATALOGUE", "its source is nothing that everybody may be shown"));
        }
        if self.terms.starts_with("https://") || self.terms.starts_with("http://") {
            return Ok(());
        }
        Err(Error::invalid("BAD_CATALOGUE", "its `terms` are not the address of a page"))
    }

    fn origin(&self) -> Origin {
        Origin { kind: self.r#type.clone(), uri: self.uri.clone(), options: self.options.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_catalogue_is_the_platforms_list() {
        let catalogue = Catalogue::open(None).unwrap();
        let names: Vec<_> = catalogue.0.iter().map(|offer| offer.name.as_str()).collect();
        let starting = |word: &str| names.iter().filter(|name| name.starts_with(word)).count();
        assert_eq!((names.len(), starting("stable-diffusion-"), starting("whisper-")), (19, 10, 5));
        for (name, uri) in [
            ("stable-diffusion-v1-4", "CompVis/stable-diffusion-v-1-4-original"),
            ("stable-diffusion-v1-4-diffuser", "CompVis/stable-diffusion-v1-4"),
            ("stable-diffusion-v2-upscaler", "stabilityai/stable-diffusion-x4-upscaler"),
            ("gpt-neox-20b", "EleutherAI/gpt-neox-20b"),
        ] {
            assert_eq!(catalogue.origin(name).unwrap().uri, uri);
        }
        assert_eq!(catalogue.origin("gpt-j-6b-float16").unwrap().options["branch"], "float16");
        assert!(catalogue.0.iter().all(|offer| offer.terms.contains(&offer.uri)));
    }

    #[test]
    fn a_name_that_is_not_there_is_answered_with_those_like_it() {
        let catalogue = Catalogue::open(None).unwrap();
        let error = catalogue.origin("wisper-tiny").unwrap_err();
        assert_eq!(error.reason(), "NOT_IN_CATALOGUE");
        assert!(error.remedy_text().unwrap().starts_with("did you mean whisper-tiny"), "{error:?}");
        assert!(catalogue.origin("zzz").unwrap_err().remedy_text().unwrap().contains("ckptctl catalog"));
    }

    #[test]
    fn a_catalogue_that_is_wrong_says_where() {
        let entry = |name: &str, kind: &str, uri: &str, terms: &str| {
            format!("[[checkpoint]]\nname = '{name}'\ntype = '{kind}'\nuri = '{uri}'\nterms = '{terms}'\n")
        };
        let good = entry("a", "huggingface", "x/y", "https://x/y");
        assert_eq!(Catalogue::parse(&good).unwrap().entries().len(), 1);
        for bad in [
            format!("{good}{good}"),
            entry("a", "floppy", "x/y", "https://x"),
            entry("a", "huggingface", "x/y/z", "https://x"),
            entry("a", "huggingface", "x/y", "see there"),
            entry("", "huggingface", "x/y", "https://x"),
            entry("a", "directory", "/etc", "https://x"),
            entry("a", "web", "https://u:p@h/x", "https://x"),
            good.replace("terms", "licence"),
            "[[checkpoint".to_owned(),
        ] {
            let error = Catalogue::parse(&bad).err().unwrap_or_else(|| panic!("{bad}"));
            assert_eq!(error.reason(), "BAD_CATALOGUE", "{bad}");
        }
    }
}
