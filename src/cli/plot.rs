//! Plots as SVG.

use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// One method in a plot of cost against quality.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// Shown beside it.
    pub name: String,
    /// Cost.
    pub x: f64,
    /// Quality.
    pub y: f64,
    /// Standard error of `y`.
    pub error: f64,
}

const SIZE: (u32, u32) = (960, 640);

/// A range that holds all values, with some room around.
fn around(values: impl Iterator<Item = f64>) -> std::ops::Range<f64> {
    let (low, high) = values
        .filter(|v| v.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if low > high {
        return 0.0..1.0;
    }
    let room = ((high - low) * 0.08).max(high.abs().max(1e-3) * 0.02);
    low - room..high + room
}

/// Quality against cost, a point with its error for each method.
///
/// # Errors
/// When the drawing fails.
pub fn frontier(title: &str, axes: [&str; 2], points: &[Point]) -> Result<String> {
    let mut svg = String::new();
    let failed = |e: &dyn std::fmt::Display| anyhow!("cannot draw the plot: {e}");
    {
        let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        area.fill(&WHITE).map_err(|e| failed(&e))?;
        let xs = around(points.iter().map(|p| p.x));
        let xs = 0f64.min(xs.start)..xs.end * 1.15;
        let ys = around(points.iter().flat_map(|p| [p.y - p.error, p.y + p.error]));
        let mut chart = ChartBuilder::on(&area)
            .caption(title, ("sans-serif", 20))
            .margin(16)
            .x_label_area_size(48)
            .y_label_area_size(64)
            .build_cartesian_2d(xs, ys)
            .map_err(|e| failed(&e))?;
        chart
            .configure_mesh()
            .x_desc(axes[0])
            .y_desc(axes[1])
            .light_line_style(WHITE)
            .draw()
            .map_err(|e| failed(&e))?;
        for (i, p) in points.iter().enumerate() {
            let color = Palette99::pick(i).to_rgba();
            let bar = PathElement::new(vec![(p.x, p.y - p.error), (p.x, p.y + p.error)], color);
            chart.draw_series(std::iter::once(bar)).map_err(|e| failed(&e))?;
            let mark = EmptyElement::at((p.x, p.y))
                + Circle::new((0, 0), 4, color.filled())
                + Text::new(p.name.clone(), (7, -6), ("sans-serif", 12));
            chart.draw_series(std::iter::once(mark)).map_err(|e| failed(&e))?;
        }
        area.present().map_err(|e| failed(&e))?;
    }
    Ok(svg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_is_named_in_the_plot() {
        let point = |name: &str, x, y| Point { name: name.into(), x, y, error: 0.5 };
        let points = [point("dense", 100.0, 96.0), point("a<b", 20.0, 95.0)];
        let svg = frontier("copy", ["KV bytes", "top-1"], &points).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        for text in ["dense", "a&lt;b", "KV bytes", "top-1"] {
            assert!(svg.contains(text), "{text}: {svg}");
        }
        frontier("nothing", ["x", "y"], &[]).unwrap();
    }
}
