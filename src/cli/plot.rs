//! Plots as SVG: panels one below the other.

use super::table::Table;
use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

/// One plot of a page.
#[derive(Clone, Debug, PartialEq)]
pub enum Panel {
    /// Quality against cost, a point with its error for each method.
    Points {
        /// Above the plot.
        title: String,
        /// Below and beside it.
        axes: [&'static str; 2],
        /// The methods.
        points: Vec<Point>,
    },
    /// Lines with intervals.
    Lines {
        /// Above the plot.
        title: String,
        /// Below and beside it.
        axes: [&'static str; 2],
        /// The methods.
        lines: Vec<Line>,
    },
    /// Shares by column and row.
    Heat(Heat),
}

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

/// One line.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// Shown at its end.
    pub name: String,
    /// From left to right.
    pub points: Vec<LinePoint>,
}

/// A point of a line with its interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinePoint {
    pub x: f64,
    pub y: f64,
    pub low: f64,
    pub high: f64,
}

/// Shares from 0 to 1 in a grid; light is 0, dark is 1.
#[derive(Clone, Debug, PartialEq)]
pub struct Heat {
    pub title: String,
    /// What columns and rows are.
    pub axes: [&'static str; 2],
    pub columns: Vec<String>,
    pub rows: Vec<String>,
    /// `[rows][columns]`; nothing is drawn where nothing was measured.
    pub values: Vec<Vec<Option<f64>>>,
}

impl Heat {
    /// The same as a table of percents.
    pub fn table(&self, corner: &str) -> Table {
        let columns = self.columns.iter().map(|c| format!(">{c}"));
        let names: Vec<String> = std::iter::once(corner.to_string()).chain(columns).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut table = Table::new(&names).titled(&self.title);
        for (name, values) in self.rows.iter().zip(&self.values) {
            let cells =
                values.iter().map(|v| v.map_or("-".into(), |v| format!("{:.0}", 100.0 * v)));
            table.row(std::iter::once(name.clone()).chain(cells));
        }
        table
    }

    fn height(&self) -> u32 {
        HEAT_TOP + HEAT_BOTTOM + (self.rows.len() as u32 * 36).clamp(36, 1200)
    }
}

const WIDTH: u32 = 960;
const HEIGHT: u32 = 560;
const HEAT_LEFT: i32 = 90;
const HEAT_TOP: u32 = 44;
const HEAT_BOTTOM: u32 = 52;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws panels one below the other.
///
/// # Errors
/// When the drawing fails.
pub fn page(panels: &[Panel]) -> Result<String> {
    let heights = panels.iter().map(|p| match p {
        Panel::Heat(heat) => heat.height(),
        _ => HEIGHT,
    });
    let heights: Vec<u32> = heights.collect();
    let mut svg = String::new();
    {
        let size = (WIDTH, heights.iter().sum::<u32>().max(1));
        let mut rest = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        rest.fill(&WHITE).map_err(failed)?;
        for (panel, height) in panels.iter().zip(heights) {
            let (area, below) = rest.split_vertically(height);
            match panel {
                Panel::Points { title, axes, points } => draw_points(&area, title, axes, points)?,
                Panel::Lines { title, axes, lines } => draw_lines(&area, title, axes, lines)?,
                Panel::Heat(heat) => draw_heat(&area, heat)?,
            }
            rest = below;
        }
        rest.present().map_err(failed)?;
    }
    Ok(svg)
}

fn failed(e: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw the plot: {e}")
}

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

/// An element of a plot: a line between points.
fn path(points: Vec<(f64, f64)>, color: RGBAColor) -> PathElement<(f64, f64)> {
    PathElement::new(points, color)
}

/// A dot with a name beside it.
macro_rules! mark {
    ($at:expr, $radius:expr, $color:expr, $name:expr) => {
        EmptyElement::at($at)
            + Circle::new((0, 0), $radius, $color.filled())
            + Text::new($name, (7, -6), ("sans-serif", 12))
    };
}

/// Opens a chart with its frame drawn.
macro_rules! chart {
    ($area:expr, $title:expr, $axes:expr, $xs:expr, $ys:expr) => {{
        let mut chart = ChartBuilder::on($area)
            .caption($title, ("sans-serif", 20))
            .margin(16)
            .x_label_area_size(48)
            .y_label_area_size(64)
            .build_cartesian_2d($xs, $ys)
            .map_err(failed)?;
        chart
            .configure_mesh()
            .x_desc($axes[0])
            .y_desc($axes[1])
            .light_line_style(WHITE)
            .draw()
            .map_err(failed)?;
        chart
    }};
}

fn draw_points(area: &Area<'_>, title: &str, axes: &[&str; 2], points: &[Point]) -> Result<()> {
    let xs = around(points.iter().map(|p| p.x));
    let xs = 0f64.min(xs.start)..xs.end * 1.15;
    let ys = around(points.iter().flat_map(|p| [p.y - p.error, p.y + p.error]));
    let mut chart = chart!(area, title, axes, xs, ys);
    for (i, p) in points.iter().enumerate() {
        let color = Palette99::pick(i).to_rgba();
        let bar = path(vec![(p.x, p.y - p.error), (p.x, p.y + p.error)], color);
        chart.draw_series(std::iter::once(bar)).map_err(failed)?;
        let dot = mark!((p.x, p.y), 4, color, p.name.clone());
        chart.draw_series(std::iter::once(dot)).map_err(failed)?;
    }
    Ok(())
}

fn draw_lines(area: &Area<'_>, title: &str, axes: &[&str; 2], lines: &[Line]) -> Result<()> {
    let points = || lines.iter().flat_map(|l| &l.points);
    let xs = around(points().map(|p| p.x));
    // Names stand at the ends.
    let xs = xs.start..xs.end + (xs.end - xs.start) * 0.2;
    let ys = around(points().flat_map(|p| [p.low, p.high, p.y]));
    let mut chart = chart!(area, title, axes, xs, ys);
    for (i, line) in lines.iter().enumerate() {
        let color = Palette99::pick(i).to_rgba();
        let spans = line.points.iter().filter(|p| p.low < p.high);
        let bars = spans.map(|p| path(vec![(p.x, p.low), (p.x, p.high)], color));
        chart.draw_series(bars).map_err(failed)?;
        let whole = path(line.points.iter().map(|p| (p.x, p.y)).collect(), color);
        chart.draw_series(std::iter::once(whole)).map_err(failed)?;
        let last = line.points.len().saturating_sub(1);
        let name = |k: usize| if k == last { line.name.clone() } else { String::new() };
        let dots =
            line.points.iter().enumerate().map(|(k, p)| mark!((p.x, p.y), 2, color, name(k)));
        chart.draw_series(dots).map_err(failed)?;
    }
    Ok(())
}

/// From light to dark blue.
fn shade(share: f64) -> RGBColor {
    let share = share.clamp(0.0, 1.0);
    let mix = |light: f64, dark: f64| (light + (dark - light) * share).round() as u8;
    RGBColor(mix(247.0, 8.0), mix(251.0, 48.0), mix(255.0, 107.0))
}

fn draw_heat(area: &Area<'_>, heat: &Heat) -> Result<()> {
    let text = |s: String, at: (i32, i32), size: i32, color: &RGBColor| {
        area.draw(&Text::new(s, at, ("sans-serif", size).into_font().color(color))).map_err(failed)
    };
    let (top, width) = (HEAT_TOP as i32, WIDTH as i32 - HEAT_LEFT - 24);
    let height = (heat.height() - HEAT_TOP - HEAT_BOTTOM) as i32;
    let (columns, rows) = (heat.columns.len().max(1) as i32, heat.rows.len().max(1) as i32);
    let x = |c: usize| HEAT_LEFT + width * c as i32 / columns;
    let y = |r: usize| top + height * r as i32 / rows;
    text(heat.title.clone(), (HEAT_LEFT, 14), 20, &BLACK)?;
    text(heat.axes[1].into(), (8, 24), 12, &BLACK)?;
    text(heat.axes[0].into(), (HEAT_LEFT, top + height + 24), 12, &BLACK)?;
    for (r, values) in heat.values.iter().enumerate() {
        let name = heat.rows.get(r).cloned().unwrap_or_default();
        text(name, (8, (y(r) + y(r + 1)) / 2 - 6), 12, &BLACK)?;
        for (c, value) in values.iter().enumerate() {
            let Some(v) = value else { continue };
            let cell = [(x(c), y(r)), (x(c + 1) - 1, y(r + 1) - 1)];
            area.draw(&Rectangle::new(cell, shade(*v).filled())).map_err(failed)?;
            let color = if *v > 0.5 { WHITE } else { BLACK };
            let middle = ((x(c) + x(c + 1)) / 2 - 8, (y(r) + y(r + 1)) / 2 - 6);
            text(format!("{:.0}", 100.0 * v), middle, 12, &color)?;
        }
    }
    for (c, name) in heat.columns.iter().enumerate() {
        text(name.clone(), ((x(c) + x(c + 1)) / 2 - 8, top + height + 8), 12, &BLACK)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_is_named_in_the_plot() {
        let point = |name: &str, x, y| Point { name: name.into(), x, y, error: 0.5 };
        let points = vec![point("dense", 100.0, 96.0), point("a<b", 20.0, 95.0)];
        let at = |x| LinePoint { x, y: x, low: x - 1.0, high: x + 1.0 };
        let lines = vec![Line { name: "rising".into(), points: vec![at(1.0), at(2.0)] }];
        let heat = Heat {
            title: "grid".into(),
            axes: ["tokens", "depth"],
            columns: vec!["1024".into(), "2048".into()],
            rows: vec!["50 %".into()],
            values: vec![vec![Some(0.25), None]],
        };
        assert_eq!(
            heat.table("depth").to_string(),
            "grid\ndepth  1024  2048\n-----  ----  ----\n50 %     25     -\n"
        );
        let title = || "copy".to_string();
        let svg = page(&[
            Panel::Points { title: title(), axes: ["KV bytes", "top-1"], points },
            Panel::Lines { title: title(), axes: ["position", "nats"], lines },
            Panel::Heat(heat),
        ])
        .unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{svg}");
        let texts =
            ["dense", "a&lt;b", "KV bytes", "top-1", "rising", "nats", "grid", "1024", "50 %"];
        for text in texts {
            assert!(svg.contains(text), "{text}: {svg}");
        }
        let empty = Panel::Points { title: title(), axes: ["x", "y"], points: vec![] };
        page(&[empty, Panel::Lines { title: title(), axes: ["x", "y"], lines: vec![] }]).unwrap();
        page(&[]).unwrap();
    }
}
