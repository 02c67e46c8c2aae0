//! Which nodes stay as they are.

use super::QuantizeOptions;
use super::edit::{full_op, label};
use crate::error::{Error, ErrorCode, Result};
use crate::onnx::{Graph, Node};

/// Whether `text` fits a pattern in which `*` stands for any characters and `?` for one.
fn fits(pattern: &str, text: &str) -> bool {
    let (p, t): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut i, mut j) = (0, 0);
    // Where to go on after the last star: the star eats one character more.
    let mut star = None;
    while j < t.len() {
        if i < p.len() && p[i] == '*' {
            star = Some((i, j));
            i += 1;
        } else if i < p.len() && (p[i] == '?' || p[i] == t[j]) {
            i += 1;
            j += 1;
        } else if let Some((at, from)) = star {
            i = at + 1;
            j = from + 1;
            star = Some((at, j));
        } else {
            return false;
        }
    }
    p[i..].iter().all(|&c| c == '*')
}

/// Whether the options leave this node out.
pub(super) fn skips(options: &QuantizeOptions, node: &Node) -> bool {
    let (name, op) = (label(node), full_op(node));
    options.skip_nodes.iter().any(|p| p == name || fits(p, name))
        || options.skip_ops.iter().any(|p| p == &op || fits(p, &op))
}

/// A name that no node has is a mistake of the caller.
pub(super) fn check(options: &QuantizeOptions, graph: &Graph) -> Result<()> {
    for name in options.skip_nodes.iter().filter(|p| !p.contains(['*', '?'])) {
        if !graph.nodes.iter().any(|n| label(n) == name) {
            return Err(Error::new(ErrorCode::InvalidOption, format!("no node of the graph is called \"{name}\"")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::fits;

    #[test]
    fn patterns() {
        for (pattern, text, want) in [
            ("*", "", true),
            ("a*c", "abbc", true),
            ("a*c", "abb", false),
            ("/layer.?/*/query*", "/layer.3/self/query/MatMul", true),
            ("?", "", false),
            ("*a*b*", "xxaxxbxx", true),
            ("ab", "abc", false),
        ] {
            assert_eq!(fits(pattern, text), want, "{pattern} {text}");
        }
    }
}
