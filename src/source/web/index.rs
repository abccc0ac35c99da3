//! What an index page lists.
//!
//! Pages are HTML (nginx, Apache plain and fancy, Python, Caddy, and any page that is mostly relative links), JSON (nginx, Caddy)
//! or XML (nginx), told apart by their `Content-Type`. They are hostile: of whatever they link to only that counts which lies strictly below the page's
//! own directory on the same origin, without query and fragment. So links to parents, to the page sorted otherwise, and to other sites are
//! passed over, and following links can never go in a circle.
//!
//! Names, types and nothing else are taken from a page: sizes in HTML are rounded, and no page tells a validator.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use reqwest::Url;
use serde::Deserialize;

use super::html;
use crate::names::{EntryName, EntryPath};

/// What is left as it is in one path component of a URL: RFC 3986's unreserved characters.
const COMPONENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// How the titles of index pages begin that may list nothing: nginx and Apache, Python.
const TITLES: [&str; 2] = ["index of", "directory listing for"];

/// How the queries of links begin that show an index page sorted otherwise: Apache, Caddy.
const SORTING: [&str; 2] = ["C=", "sort="];

/// What a page lists, in its order.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Index {
    pub(super) links: Vec<Link>,
    /// Names that cannot be in a checkpoint, or are no files, with the reason.
    pub(super) refused: Vec<(String, String)>,
}

/// Something below a page.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Link {
    /// Its path from the page's directory, never the root.
    pub(super) path: EntryPath,
    /// Where it is.
    pub(super) url: Url,
    /// Whether it is a directory, as far as its name says.
    pub(super) directory: bool,
}

/// What the page `text` of the type `content_type`, found at `url`, lists; `None` if it is no index.
pub(super) fn parse(content_type: &str, text: &[u8], url: &Url) -> Option<Index> {
    let base = url.join(".").ok()?;
    let kind = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    match kind.as_str() {
        "application/json" => from_json(text, &base),
        "text/xml" | "application/xml" => from_xml(&String::from_utf8_lossy(text), &base),
        "text/html" | "application/xhtml+xml" => from_html(&String::from_utf8_lossy(text), &base),
        _ => None,
    }
}

fn from_html(page: &str, base: &Url) -> Option<Index> {
    let mut index = Index::default();
    let mut elsewhere = 0;
    let mut is_index = false;
    for tag in html::tags(page) {
        if tag.is("title") {
            let title = tag.text().trim().to_ascii_lowercase();
            is_index |= TITLES.iter().any(|begin| title.starts_with(begin));
        }
        let Some(link) = tag.attribute("href").filter(|_| tag.is("a")) else { continue };
        let Ok(url) = base.join(link.trim()) else { continue };
        match place(base, &url) {
            Place::Below => index.add(base, url),
            Place::Itself => {
                is_index |= url.query().is_some_and(|query| SORTING.iter().any(|word| query.starts_with(word)));
            }
            Place::Elsewhere => elsewhere += 1,
        }
    }
    let listed = index.links.len() + index.refused.len();
    (is_index || (listed > 0 && listed >= elsewhere)).then_some(index)
}

/// One entry as nginx and Caddy write it.
#[derive(Deserialize)]
struct JsonEntry {
    name: String,
    #[serde(rename = "type")]
    kind: Option<String>,
    is_dir: Option<bool>,
}

fn from_json(text: &[u8], base: &Url) -> Option<Index> {
    let entries: Vec<JsonEntry> = serde_json::from_slice(text).ok()?;
    let mut index = Index::default();
    for entry in entries {
        match (entry.kind.as_deref(), entry.is_dir) {
            (Some("directory"), _) | (None, Some(true)) => {
                index.add_named(base, entry.name.trim_end_matches('/'), true);
            }
            (Some("file"), _) | (None, Some(false)) => index.add_named(base, &entry.name, false),
            (Some(other), _) => {
                index.refused.push((entry.name, format!("is neither file nor directory but `{other}`")));
            }
            (None, None) => return None,
        }
    }
    Some(index)
}

fn from_xml(page: &str, base: &Url) -> Option<Index> {
    let mut tags = html::tags(page);
    tags.next().filter(|root| root.is("list"))?;
    let mut index = Index::default();
    for tag in tags {
        match tag.name {
            "directory" | "file" => index.add_named(base, &tag.text(), tag.name == "directory"),
            other => index.refused.push((tag.text(), format!("is neither file nor directory but `{other}`"))),
        }
    }
    Some(index)
}

impl Index {
    /// Adds the file or directory called `name`.
    fn add_named(&mut self, base: &Url, name: &str, directory: bool) {
        let slash = if directory { "/" } else { "" };
        let written = format!("./{}{slash}", utf8_percent_encode(name, COMPONENT));
        match (EntryName::new(name.as_bytes()), base.join(&written)) {
            (Ok(_), Ok(url)) => self.add(base, url),
            (Err(fault), _) => self.refused.push((name.to_owned(), fault.to_string())),
            (Ok(_), Err(fault)) => self.refused.push((name.to_owned(), fault.to_string())),
        }
    }

    /// Adds what is at `url`, which is below `base`.
    fn add(&mut self, base: &Url, url: Url) {
        let depth = segments(base).count() - 1;
        let directory = url.path().ends_with('/');
        let names = segments(&url).skip(depth).collect::<Vec<_>>();
        let names = &names[..names.len() - usize::from(directory)];
        let path = names.iter().try_fold(EntryPath::root(), |path, name| {
            let name: Vec<u8> = percent_decode_str(name).collect();
            path.join(&EntryName::new(name)?)
        });
        match path {
            Ok(path) => self.links.push(Link { path, url, directory }),
            Err(fault) => self.refused.push((names.join("/"), fault.to_string())),
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// Strictly below, as it is.
    Below,
    /// The page itself, perhaps sorted otherwise, or a parent of it.
    Itself,
    Elsewhere,
}

/// Where `url` is, seen from the directory `base`. Names are compared decoded: servers differ in what they encode.
fn place(base: &Url, url: &Url) -> Place {
    if url.origin() != base.origin() || !matches!(url.scheme(), "http" | "https") {
        return Place::Elsewhere;
    }
    let decode = |segment: &str| percent_decode_str(segment).collect::<Vec<u8>>();
    let (ours, theirs) = (segments(base).map(decode), segments(url).map(decode));
    let (ours, theirs): (Vec<_>, Vec<_>) = (ours.collect(), theirs.collect());
    // The last segment of a directory is empty.
    let ours = &ours[..ours.len() - 1];
    let shared = ours.iter().zip(&theirs).take_while(|(our, their)| our == their).count();
    if shared == ours.len() && theirs[shared..].concat().is_empty() {
        return Place::Itself;
    }
    if shared == ours.len() {
        return if url.query().is_none() && url.fragment().is_none() { Place::Below } else { Place::Itself };
    }
    if theirs[shared..].concat().is_empty() { Place::Itself } else { Place::Elsewhere }
}

fn segments(url: &Url) -> std::str::Split<'_, char> {
    url.path().trim_start_matches('/').split('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    const NGINX: &str = "<html>\r\n<head><title>Index of /a b/</title></head>\r\n<body>\r\n<h1>Index of /a b/</h1><hr>\
        <pre><a href=\"../\">../</a>\r\n<a href=\"sub/\">sub/</a>   23-Nov-2026 21:00   -\r\n\
        <a href=\"x%20%25%23%26%27%2B.bin\">x %#&amp;'+.bin</a>  23-Nov-2026 21:00  4096\r\n</pre><hr></body></html>";

    fn listed(content_type: &str, text: &str) -> Option<Vec<String>> {
        let url = Url::parse("http://h/a%20b/").unwrap();
        let index = parse(content_type, text.as_bytes(), &url)?;
        let shown = |link: &Link| format!("{}{}", link.path, if link.directory { "/" } else { "" });
        Some(index.links.iter().map(shown).collect())
    }

    fn html(text: &str) -> Option<Vec<String>> {
        listed("text/html; charset=utf-8", text)
    }

    #[test]
    fn the_pages_of_the_usual_servers_are_understood() {
        assert_eq!(html(NGINX).unwrap(), ["sub/", "x %#&'+.bin"]);
        let apache = "<title>Index of /a b</title><table><tr><th><a href=\"?C=N;O=D\">Name</a></th></tr>\
            <tr><td><a href=\"/\">Parent Directory</a></td></tr><tr><td><a href=\"w+1.bin\">w+1.bin</a></td></tr>";
        assert_eq!(html(apache).unwrap(), ["w+1.bin"]);
        let caddy =
            "[{\"name\":\"a&b\",\"size\":4,\"url\":\"./a&b\",\"is_dir\":false},{\"name\":\"d/\",\"is_dir\":true}]";
        assert_eq!(listed("application/json", caddy).unwrap(), ["a&b", "d/"]);
        let json = "[{\"name\":\"d\",\"type\":\"directory\"},{\"name\":\"f%20:\",\"type\":\"file\",\"size\":3},\
            {\"name\":\"s\",\"type\":\"other\"},{\"name\":\"..\",\"type\":\"directory\"}]";
        assert_eq!(listed("application/json", json).unwrap(), ["d/", "f%20:"]);
        let xml = "<?xml version=\"1.0\"?>\n<list>\n<directory mtime=\"x\">d</directory>\n<file size=\"1\">a&amp;b</file></list>";
        assert_eq!(listed("text/xml", xml).unwrap(), ["d/", "a&b"]);
    }

    #[test]
    fn only_what_is_below_on_the_same_origin_counts() {
        let page = |link: &str| format!("<title>Index of</title><a href=\"{link}\">");
        for (link, path) in [
            ("x", Some("x")),
            ("./x", Some("x")),
            ("/a b/x", Some("x")),
            ("/%61%20b/x", Some("x")),
            ("http://h/a%20b/x/y/", Some("x/y/")),
            ("z/../x", Some("x")),
            ("..", None),
            ("../c/x", None),
            ("%2e%2e/x", None),
            ("/a b", None),
            ("", None),
            ("#x", None),
            ("x#y", None),
            ("?C=N;O=D", None),
            ("x?y", None),
            ("//h2/a b/x", None),
            ("https://h/a b/x", None),
            ("http://h:81/a b/x", None),
            ("javascript:x()", None),
            ("mailto:x@h", None),
            ("http://[/", None),
            ("x%2fy", None),
            ("x//y", None),
            ("x%00", None),
        ] {
            assert_eq!(html(&page(link)).unwrap(), Vec::from_iter(path), "{link}");
        }
    }

    #[test]
    fn a_page_that_is_no_index_is_none() {
        assert_eq!(html("<title>Index of /x/</title><a href=\"../\">").unwrap(), [""; 0]);
        assert_eq!(html("<title>Shop</title><a href=about.html><a href=//a/><a href=//b/>"), None);
        assert_eq!(html("<title>Weights</title><a href=w.bin><a href=//a/>").unwrap(), ["w.bin"]);
        assert_eq!(html("<title>x</title><a href=?sort=name><a href=//caddy/>").unwrap(), [""; 0]);
        assert_eq!(html("<p>nothing"), None);
        assert_eq!(listed("application/json", "{\"error\":1}"), None);
        assert_eq!(listed("application/json", "[{\"name\":\"x\"}]"), None);
        assert_eq!(listed("application/json", "[]").unwrap(), [""; 0]);
        assert_eq!(listed("text/xml", "<ListBucketResult><file>x</file></ListBucketResult>"), None);
        assert_eq!(listed("text/plain", "x"), None);
    }
}
