// A dashboard, drawn by Grafana's components from what its queries gave: window.measured, as measure.py leaves it.
//
// What Grafana itself does around them is done here: the grid, the fields' settings, legends from labels.

import {
  createDataFrame, createTheme, dateTime, fieldMatchers, FieldType, getDisplayProcessor, getFieldDisplayValues,
  getMinMaxAndDelta, LoadingState, ThemeContext,
} from "@grafana/data";
import { BigValue, GlobalStyles, Icon, PanelChrome, TimeSeries } from "@grafana/ui";
import { createRoot } from "react-dom/client";

const CELL = 30; // pixels that a cell of the grid is high
const GAP = 8; // between two cells
const COLUMNS = 24;
const MARGIN = 16; // around everything
const { dashboard, results, from, to } = window.measured;
const theme = createTheme({ colors: { mode: "dark" } });
const timeRange = { from: dateTime(from * 1000), to: dateTime(to * 1000), raw: { from: "now-30m", to: "now" } };

// Where a panel lies, in pixels.
function place({ x, y, w, h }, width) {
  const column = (width - (COLUMNS - 1) * GAP) / COLUMNS;
  const across = (cells) => cells * column + (cells - 1) * GAP;
  const down = (cells) => cells * CELL + (cells - 1) * GAP;
  return { left: x * (column + GAP), top: y * (CELL + GAP), width: across(w), height: down(h) };
}

// A series' name: its query's legend with its labels in it.
function legend(format, labels) {
  return format.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, name) => labels[name] ?? "");
}

// A panel's settings for its fields, as Grafana completes them when it loads a dashboard.
function fieldConfig({ defaults }) {
  const steps = defaults.thresholds?.steps.map((step) => ({ ...step, value: step.value ?? -Infinity }));
  const custom = { axisPlacement: "auto", lineInterpolation: "linear", pointSize: 5, scaleDistribution: { type: "linear" } };
  return { ...defaults, thresholds: { ...defaults.thresholds, steps }, custom: { ...custom, ...defaults.custom } };
}

// What a panel says of single fields. None of ours says anything deeper than a setting of the first level.
function override(field, frame, { overrides }) {
  for (const { matcher, properties } of overrides) {
    if (fieldMatchers.get(matcher.id).get(matcher.options)(field, frame, [frame])) {
      Object.assign(field.config, Object.fromEntries(properties.map(({ id, value }) => [id, value])));
    }
  }
}

// The data frames of a panel, one for each series.
function frames(panel) {
  const series = panel.targets.flatMap((target) =>
    results[panel.id][target.refId].map(({ metric, values }) => ({ target, metric, values })),
  );
  return series.map(({ target, metric, values }, index) => {
    const frame = createDataFrame({
      refId: target.refId,
      fields: [
        { name: "Time", type: FieldType.time, config: { interval: 15000 }, values: values.map(([time]) => time * 1000) },
        {
          name: "Value",
          type: FieldType.number,
          config: { ...fieldConfig(panel.fieldConfig), displayNameFromDS: legend(target.legendFormat, metric) },
          labels: metric,
          values: values.map(([, value]) => (value === "NaN" ? null : Number(value))),
        },
      ],
    });
    const [, field] = frame.fields;
    override(field, frame, panel.fieldConfig);
    field.state = { range: getMinMaxAndDelta(field), seriesIndex: index };
    field.display = getDisplayProcessor({ field, theme, timeZone: "utc" });
    return frame;
  });
}

function Stat({ panel, width, height }) {
  const { reduceOptions, ...look } = panel.options;
  const [value] = getFieldDisplayValues({
    data: frames(panel),
    fieldConfig: { defaults: fieldConfig(panel.fieldConfig), overrides: [] },
    reduceOptions,
    replaceVariables: (text) => text,
    sparkline: look.graphMode !== "none",
    theme,
    timeZone: "utc",
  });
  const sparkline = value.sparkline && { ...value.sparkline, timeRange };
  return (
    <BigValue
      {...look} height={height} sparkline={sparkline} theme={theme} value={{ ...value.display, title: "" }} width={width}
    />
  );
}

function Graph({ panel, width, height }) {
  return (
    <TimeSeries
      frames={frames(panel)} height={height} legend={panel.options.legend} structureRev={1} theme={theme}
      timeRange={timeRange} timeZone="utc" width={width}
    />
  );
}

const KINDS = { stat: Stat, timeseries: Graph };

function Panel({ panel, area }) {
  const Kind = KINDS[panel.type];
  return (
    <PanelChrome
      description={panel.description} height={area.height} loadingState={LoadingState.Done} title={panel.title}
      width={area.width}
    >
      {(width, height) => <Kind height={height} panel={panel} width={width} />}
    </PanelChrome>
  );
}

function Row({ title }) {
  const style = { alignItems: "center", display: "flex", fontWeight: 500, gap: 8, height: CELL };
  return (
    <div style={style}>
      <Icon name="angle-down" /> {title}
    </div>
  );
}

function Dashboard({ width }) {
  const lowest = Math.max(...dashboard.panels.map(({ gridPos }) => gridPos.y + gridPos.h));
  const everything = { height: lowest * (CELL + GAP) - GAP, position: "relative", width };
  return (
    <div id="dashboard" style={{ padding: MARGIN }}>
      <div style={everything}>
        {dashboard.panels.map((panel) => {
          const area = place(panel.gridPos, width);
          return (
            <div key={panel.id} data-type={panel.type} style={{ ...area, position: "absolute" }}>
              {panel.type === "row" ? <Row title={panel.title} /> : <Panel area={area} panel={panel} />}
            </div>
          );
        })}
      </div>
    </div>
  );
}

createRoot(document.getElementById("page")).render(
  <ThemeContext.Provider value={theme}>
    <GlobalStyles />
    <Dashboard width={document.documentElement.clientWidth - 2 * MARGIN} />
  </ThemeContext.Provider>,
);
