//! The little XML that object stores speak: lists of records with named texts, and errors.
//!
//! Texts are given as they are, white space and all: keys may begin and end with it. Entities beyond the five of XML and character references are
//! no text at all, so nothing expands.

use std::collections::HashMap;

use quick_xml::Reader;
use quick_xml::escape::resolve_predefined_entity;
use quick_xml::events::{BytesRef, Event};

/// Texts by the name of the element they are in.
pub(super) type Fields = HashMap<String, String>;

/// Depth of elements; real answers have five.
const DEPTH: usize = 16;

/// Azure begins its documents with one.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// What a document says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Document {
    /// Texts outside of records.
    pub(super) fields: Fields,
    /// Records in their order.
    pub(super) records: Vec<Fields>,
}

impl Document {
    /// Reads `document`, whose records are elements called `record`. An attribute `Encoded="true"` of an element `Name` is
    /// kept as the field `Name-Encoded`, for Azure.
    pub(super) fn read(document: &[u8], record: &str) -> Option<Self> {
        let mut reader = Reader::from_reader(document.strip_prefix(BYTE_ORDER_MARK).unwrap_or(document));
        let mut found = Self::default();
        let mut open: Vec<String> = Vec::new();
        let mut text = String::new();
        let mut inside: Option<Fields> = None;
        let mut seen = false;
        loop {
            match reader.read_event().ok()? {
                Event::Start(start) => {
                    let name = std::str::from_utf8(start.local_name().into_inner()).ok()?.to_owned();
                    if name == record {
                        inside = Some(Fields::new());
                    }
                    if start.attributes().flatten().any(|at| at.key.into_inner() == b"Encoded" && &*at.value == b"true")
                    {
                        let fields = inside.as_mut().unwrap_or(&mut found.fields);
                        fields.insert(format!("{name}-Encoded"), "true".to_owned());
                    }
                    open.push(name);
                    seen = true;
                    text.clear();
                    if open.len() > DEPTH {
                        return None;
                    }
                }
                Event::Text(piece) => text.push_str(&piece.decode().ok()?),
                Event::CData(piece) => text.push_str(&piece.decode().ok()?),
                Event::GeneralRef(reference) => text.push_str(&resolve(&reference)?),
                Event::End(_) => {
                    let name = open.pop()?;
                    if name == record {
                        found.records.extend(inside.take());
                    } else {
                        let fields = inside.as_mut().unwrap_or(&mut found.fields);
                        fields.entry(name).or_insert_with(|| std::mem::take(&mut text));
                    }
                    text.clear();
                }
                Event::Eof => return (seen && open.is_empty()).then_some(found),
                _ => {}
            }
        }
    }
}

fn resolve(reference: &BytesRef<'_>) -> Option<String> {
    if let Some(character) = reference.resolve_char_ref().ok()? {
        return Some(character.to_string());
    }
    resolve_predefined_entity(&reference.decode().ok()?).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_and_what_is_around_them_are_read() {
        let text = b"<?xml version='1.0'?><L xmlns='x'>\n <Token>t&#x26;1</Token>\n <C><Key> a&amp;b </Key><P><Size>3</Size></P></C>\
            <C><Key>c</Key><E/></C><Flag>true</Flag></L>";
        let read = Document::read(text, "C").unwrap();
        assert_eq!((read.fields["Token"].as_str(), read.fields["Flag"].as_str()), ("t&1", "true"));
        assert_eq!(read.records.len(), 2);
        assert_eq!((read.records[0]["Key"].as_str(), read.records[0]["Size"].as_str()), (" a&b ", "3"));
        assert_eq!(read.records[1]["Key"], "c");
    }

    #[test]
    fn what_is_no_document_is_nothing() {
        let deep = "<a>".repeat(100);
        let bomb = "<!DOCTYPE x [<!ENTITY a \"aaaa\">]><x>&a;</x>";
        for junk in ["", "plain", "<a>", "<a></b>", "<a>&unknown;</a>", &deep, bomb] {
            assert_eq!(Document::read(junk.as_bytes(), "C"), None, "{junk}");
        }
    }
}
