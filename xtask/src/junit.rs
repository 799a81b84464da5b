//! Finds the tests that could not run in nextest's report: those that printed `SKIPPED: why`.

/// A test that said that it, or a part of it, could not run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Skip {
    /// The test's name.
    pub test: String,
    /// What it needs.
    pub why: String,
}

const MARK: &str = "SKIPPED: ";

/// All skips in a JUnit report, in its order.
pub fn skips(report: &str) -> Vec<Skip> {
    let mut skips = Vec::new();
    for case in report.split("<testcase ").skip(1) {
        let Some((head, body)) = case.split_once('>') else { continue };
        let head = format!(" {head}");
        let attribute = |name: &str| {
            let (_, rest) = head.split_once(&format!(" {name}=\""))?;
            rest.split('"').next().map(plain)
        };
        let (Some(name), Some(class)) = (attribute("name"), attribute("classname")) else {
            continue;
        };
        for line in body.lines() {
            if let Some((_, why)) = line.split_once(MARK) {
                let why = why.split('<').next().unwrap_or_default();
                skips.push(Skip { test: format!("{class} {name}"), why: plain(why) });
            }
        }
    }
    skips
}

/// XML's five entities as what they mean.
fn plain(text: &str) -> String {
    let mut text = text.to_owned();
    // `&amp;` last: what it makes must not be read again.
    let entities =
        [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&apos;", "'"), ("&amp;", "&")];
    for (entity, meaning) in entities {
        text = text.replace(entity, meaning);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skips_are_found_with_their_tests() {
        let report = r#"<testsuites><testsuite name="a">
<testcase name="one" classname="disk" time="1"><system-out>running 1 test
SKIPPED: mounting needs root &amp; more
SKIPPED: so does this</system-out></testcase>
<testcase name="two" classname="disk" time="1"><system-out>fine</system-out></testcase>
<testcase name="m::three" classname="net"><system-err>test SKIPPED: no tap</system-err></testcase>
</testsuite></testsuites>"#;
        let skip = |test: &str, why: &str| Skip { test: test.into(), why: why.into() };
        let expected = [
            skip("disk one", "mounting needs root & more"),
            skip("disk one", "so does this"),
            skip("net m::three", "no tap"),
        ];
        assert_eq!(skips(report), expected);
        assert_eq!(skips(""), []);
    }
}
