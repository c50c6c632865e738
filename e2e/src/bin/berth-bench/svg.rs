//! The ratios as bars, on a logarithmic scale, with the targets as marks. Plain SVG, no script, no font of its own.

use std::fmt::Write;

use crate::report::Line;
use crate::rows::Target;

const LABELS: f64 = 330.0;
const BARS: f64 = 480.0;
const RIGHT: f64 = 90.0;
const ROW: f64 = 20.0;
const TOP: f64 = 56.0;
/// The greatest ratio that has room; what is beyond ends there.
const MOST: f64 = 200.0;

fn x(ratio: f64) -> f64 {
    LABELS + BARS * ratio.clamp(1.0, MOST).log10() / MOST.log10()
}

/// The picture of all lines that compare the sides.
pub fn bars(lines: &[Line]) -> String {
    let (width, height) = (LABELS + BARS + RIGHT, TOP + ROW * lines.len() as f64 + 24.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"20\" font-size=\"15\">How many times better than containerd and runc (median of rounds)</text>\n"
    );
    for tick in [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0] {
        let at = x(tick);
        let bottom = height - 20.0;
        let _ = writeln!(
            svg,
            "<line x1=\"{at:.1}\" y1=\"{TOP}\" x2=\"{at:.1}\" y2=\"{bottom}\" stroke=\"#ddd\"/>\
             <text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#555\">{tick}×</text>",
            TOP - 6.0
        );
    }
    for (n, line) in lines.iter().enumerate() {
        let y = TOP + ROW * n as f64;
        bar(&mut svg, line, y);
    }
    let _ = writeln!(
        svg,
        "<text x=\"10\" y=\"{:.1}\" fill=\"#555\">The line across a bar is the range of the rounds; the black mark is the target.</text>\n</svg>",
        height - 6.0
    );
    svg
}

fn bar(svg: &mut String, line: &Line, y: f64) {
    let [ratio, least, most] = line.ratio;
    let colour = match line.met() {
        Some(true) => "#2e7d32",
        Some(false) => "#c62828",
        None => "#78909c",
    };
    let middle = y + ROW / 2.0;
    let length = x(ratio) - LABELS;
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
         <rect x=\"{LABELS}\" y=\"{:.1}\" width=\"{length:.1}\" height=\"{:.1}\" fill=\"{colour}\" fill-opacity=\"0.75\"/>\
         <line x1=\"{:.1}\" y1=\"{middle:.1}\" x2=\"{:.1}\" y2=\"{middle:.1}\" stroke=\"#333\"/>\
         <text x=\"{:.1}\" y=\"{:.1}\">{ratio:.1}×</text>",
        LABELS - 8.0,
        middle + 4.0,
        escape(line.row.label),
        y + 3.0,
        ROW - 6.0,
        x(least),
        x(most),
        x(ratio.max(most)) + 6.0,
        middle + 4.0,
    );
    if let Target::Ratio(target) = line.row.target {
        let at = x(target);
        let _ = writeln!(
            svg,
            "<line x1=\"{at:.1}\" y1=\"{:.1}\" x2=\"{at:.1}\" y2=\"{:.1}\" stroke=\"black\" stroke-width=\"2\"/>",
            y + 2.0,
            y + ROW - 2.0
        );
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::ROWS;

    #[test]
    fn every_line_has_a_bar_within_the_picture() {
        let line = Line { row: ROWS[0], ours: (1.0, None), peer: (9e9, None), ratio: [9e9, 0.1, 9e9], cpu: None };
        let svg = bars(&[line.clone(), line]);
        assert_eq!(svg.matches("fill-opacity").count(), 2);
        assert!(svg.contains(&format!("width=\"{BARS:.1}\"")), "{svg}");
    }
}
