// autosteer.json -> Manifest. Unknown keys, missing keys and wrong types are each a PackageError: a runtime that
// ignored a key might run the gate wrongly.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "manifest_format.hpp"
#include "strict_json.hpp"

namespace autosteer::decoding {

constexpr int64_t kMostPixels = 50'000'000;  // of a "native" picture
constexpr int64_t kMostFrames = 16;          // that an image graph reads as one
constexpr double kMostPerSecond = 1000;      // positions of a video's time axis
constexpr int64_t kLargestTile = 1 << 14, kLargestGrid = 1 << 16;  // pixels along a side
constexpr int64_t kMostTiles = 1 << 8;       // of a picture

inline std::string as_precision(const Node& node) {
  return node.as_one_of({"fp32", "fp16", "int8", "int4"});
}

inline Dims dims(const Node& node) {
  node.object({"hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "vocab_size", "context_length"});
  return {node["hidden_size"].as_size(), node["num_hidden_layers"].as_size(), node["num_key_value_heads"].as_size(),
          node["head_dim"].as_size(),    node["vocab_size"].as_size(),        node["context_length"].as_size()};
}

inline TensorSpec tensor(const Node& node) {
  node.object({"name", "dtype", "shape"});
  const auto dimension = [](const Node& size) {
    return size.is_string() ? Dimension(size.as_string()) : Dimension(size.as_int());
  };
  return {node["name"].as_string(), node["dtype"].as_string(), node["shape"].list(dimension)};
}

inline GraphSpec graph(const Node& node) {
  node.object({"file", "sha256", "inputs", "outputs", "layers", "precision"});
  GraphSpec spec;
  spec.file = node["file"].as_string();
  spec.sha256 = node["sha256"].as_string();
  spec.inputs = node["inputs"].list(tensor);
  spec.outputs = node["outputs"].list(tensor);
  spec.layers = node["layers"].optional([](const Node& layers) { return layers.tuple<2>(as_int); });
  spec.precision = as_precision(node["precision"]);
  return spec;
}

inline DataFile data_file(const Node& node) {
  node.object({"file", "bytes", "sha256"});
  return {node["file"].as_string(), node["sha256"].as_string(), node["bytes"].as_int()};
}

inline RotarySpec rotary(const Node& node) {
  node.object({"frequencies", "scale", "axes"}, {"long", "windowed"});
  const auto longer = [](const Node& of) {
    of.object({"beyond", "frequencies"});
    return LongRotary{of["beyond"].as_size(), of["frequencies"].list(as_float)};
  };
  RotarySpec spec{node["frequencies"].list(as_float), node["scale"].as_float(), node["axes"].list(as_int), {}, {}};
  if (node.has("long")) spec.longer = node["long"].optional(longer);
  if (node.has("windowed")) spec.windowed = node["windowed"].list(as_float);
  return spec;
}

inline AnyresSpec anyres(const Node& node) {
  node.object({"tokens_per_side", "grid_pinpoints", "max_tiles_side"}, {"each"});
  const auto pinpoint = [](const Node& sizes) { return sizes.tuple<2>(as_size); };
  return {node["tokens_per_side"].as_size(), node["grid_pinpoints"].list(pinpoint), node["max_tiles_side"].as_size(),
          node.has("each") && node["each"].as_bool()};
}

inline SplitSpec split(const Node& node) {
  node.object({"longest_edge", "tiles"});
  return {node["longest_edge"].as_size(), node["tiles"].as_bool()};
}

inline ClosestGridSpec closest_grid(const Node& node) {
  node.object({"min_tiles", "max_tiles"});
  return {node["min_tiles"].as_size(), node["max_tiles"].as_size()};
}

inline NativeSpec native(const Node& node) {
  node.object({"min_pixels", "max_pixels", "frames"}, {"deepstack"});
  return {node["min_pixels"].as_size(), node["max_pixels"].as_size(), node["frames"].as_size(),
          node.has("deepstack") ? node["deepstack"].as_int() : 0};
}

inline TileSeparators tile_separators(const Node& node) {
  node.object({"grid", "token_ids"});
  return {node["grid"].tuple<2>(as_int), node["token_ids"].list([](const Node& ids) { return ids.list(as_int); })};
}

inline ImageSpec image(const Node& node) {
  node.object({"kind", "tile_size", "mean", "std", "rescale_factor", "resample", "anyres"},
              {"split", "native", "tile_separators", "closest_grid"});
  ImageSpec spec{node["kind"].as_one_of({"anyres", "centre_crop", "closest_grid", "native", "pad_to_square", "split"}),
                 node["tile_size"].as_size(),
                 node["mean"].tuple<3>(as_float),
                 node["std"].tuple<3>(as_float),
                 node["rescale_factor"].as_float(),
                 node["resample"].as_one_of({"nearest", "lanczos", "bilinear", "bicubic"}),
                 node["anyres"].optional(anyres),
                 {},
                 {},
                 {},
                 {}};
  if (node.has("split")) spec.split = node["split"].optional(split);
  if (node.has("native")) spec.native = node["native"].optional(native);
  if (node.has("tile_separators")) spec.tile_separators = node["tile_separators"].list(tile_separators);
  if (node.has("closest_grid")) spec.closest_grid = node["closest_grid"].optional(closest_grid);
  if ((spec.kind == "anyres") != spec.anyres.has_value()) node.fail("'kind' and 'anyres' differ");
  if ((spec.kind == "split") != spec.split.has_value()) node.fail("'kind' and 'split' differ");
  if ((spec.kind == "closest_grid") != spec.closest_grid.has_value()) node.fail("'kind' and 'closest_grid' differ");
  if ((spec.kind == "native") != spec.native.has_value()) node.fail("'kind' and 'native' differ");
  if (spec.native) {
    if (spec.native->min_pixels > spec.native->max_pixels) node.fail("min_pixels is above max_pixels");
    if (spec.native->max_pixels > kMostPixels) node.fail("max_pixels is too large");
    if (spec.tile_size * spec.tile_size > spec.native->max_pixels) node.fail("a tile has more than max_pixels");
    if (spec.native->frames > kMostFrames) node.fail("too many frames are read as one");
    if (!spec.tile_separators.empty()) node.fail("a 'native' picture has no tile_separators");
  }
  if (spec.split && spec.split->longest_edge > kLargestTile) node.fail("longest_edge is too large");
  if (spec.closest_grid) {
    if (spec.closest_grid->max_tiles > kMostTiles) node.fail("max_tiles is too large");
    if (spec.closest_grid->max_tiles * spec.tile_size > kLargestGrid) node.fail("a grid is too large");
  }
  if (spec.tile_size > kLargestTile) node.fail("tile_size is too large");
  if (std::count(spec.std.begin(), spec.std.end(), 0.0)) node.fail("std is zero");
  if (!spec.anyres) return spec;
  if (spec.anyres->grid_pinpoints.empty()) node.fail("grid_pinpoints must be given");
  for (const auto& [height, width] : spec.anyres->grid_pinpoints) {
    if (height % spec.tile_size || width % spec.tile_size) node.fail("grid_pinpoints must be whole tiles");
    if (height > kLargestGrid || width > kLargestGrid) node.fail("a grid is too large");
  }
  return spec;
}

inline NativeVideoSpec native_video(const Node& node) {
  node.object({"min_pixels", "max_pixels", "whole", "tokens_per_second"});
  NativeVideoSpec spec{node["min_pixels"].as_size(), node["max_pixels"].as_size(), node["whole"].as_bool(),
                       node["tokens_per_second"].as_float()};
  if (spec.min_pixels > spec.max_pixels) node.fail("min_pixels is above max_pixels");
  if (spec.max_pixels > kMostPixels) node.fail("max_pixels is too large");
  const bool in_range = 0 <= spec.tokens_per_second && spec.tokens_per_second <= kMostPerSecond;
  if (!in_range) node.fail("tokens_per_second is out of range");
  return spec;
}

inline VideoSpec video(const Node& node) {
  node.object({"mean", "std", "rescale_factor", "pooled_side"}, {"native"});
  VideoSpec spec{node["mean"].tuple<3>(as_float),
                 node["std"].tuple<3>(as_float),
                 node["rescale_factor"].as_float(),
                 node["pooled_side"].optional(as_size),
                 {}};
  if (node.has("native")) spec.native = node["native"].optional(native_video);
  if (std::count(spec.std.begin(), spec.std.end(), 0.0)) node.fail("std is zero");
  return spec;
}

inline TemplatePiece piece(const Node& node) {
  node.object({"kind"}, {"text", "id"});
  TemplatePiece piece;
  piece.kind = node["kind"].as_one_of({"token", "literal", "text", "image", "video", "seconds"});
  if (node.has("text")) piece.text = node["text"].as_string();
  if (node.has("id")) piece.id = node["id"].as_int();
  return piece;
}

inline TurnSpec turn(const Node& node) {
  node.object({"prefix", "image", "text", "suffix"}, {"lead", "video"});
  TurnSpec turn{node["prefix"].list(piece),
                node["image"].list(piece),
                node["text"].list(piece),
                node["suffix"].list(piece),
                {},
                {}};
  if (node.has("lead")) turn.lead = node["lead"].list(piece);
  if (node.has("video")) turn.video = node["video"].list(piece);
  return turn;
}

inline FrameGroup frame_group(const Node& node) {
  node.object({"frames", "pieces"});
  return {node["frames"].as_size(), node["pieces"].list(piece)};
}

inline PromptSpec prompt(const Node& node) {
  node.object({"begin", "system", "user", "assistant", "generation", "images_first", "strip_text", "end_token_ids"},
              {"tokenizer", "frame_group"});
  PromptSpec spec;
  spec.begin = node["begin"].list(piece);
  spec.system = node["system"].optional(turn);
  spec.user = turn(node["user"]);
  spec.assistant = turn(node["assistant"]);
  spec.generation = node["generation"].list(piece);
  spec.images_first = node["images_first"].as_bool();
  spec.strip_text = node["strip_text"].as_bool();
  spec.end_token_ids = node["end_token_ids"].list(as_int);
  if (node.has("tokenizer")) spec.tokenizer = node["tokenizer"].as_string();
  if (node.has("frame_group")) spec.frame_group = node["frame_group"].optional(frame_group);
  return spec;
}

inline ProberSpec prober(const Node& node) {
  node.object({"token_offset", "pooling", "threshold", "calibration"}, {"judge_answers", "judge_threshold"});
  for (const auto& [key, value] : node["calibration"].entries()) value.as_float();
  return {node["token_offset"].as_int(), node["pooling"].as_one_of({"last", "mean"}), node["threshold"].as_float(),
          node.has("judge_answers") && node["judge_answers"].as_bool(),
          node.has("judge_threshold") ? node["judge_threshold"].optional(as_float) : std::nullopt};
}

inline MonitorSpec monitor(const Node& node) {
  node.object({"window", "threshold", "calibration"});
  for (const auto& [key, value] : node["calibration"].entries()) value.as_float();
  return {node["window"].as_size(), node["threshold"].as_float()};
}

inline RefusalSpec refusal(const Node& node) {
  node.object({"strength", "text"}, {"formula"});
  if (node.has("formula")) node["formula"].as_string();
  return {node["strength"].as_float(), node["text"].as_string()};
}

inline Golden golden(const Node& node) {
  node.object({"prompt", "images", "threshold", "p_unsafe", "action", "token_ids"},
              {"videos", "prompt_ids", "seconds"});
  const auto frames = [](const Node& files) { return files.list(as_string); };
  const auto moments = [](const Node& seconds) { return seconds.list(as_float); };
  return {node["prompt"].as_string(),
          node["images"].list(as_string),
          node["threshold"].optional(as_float),
          node["p_unsafe"].optional(as_float),
          node["action"].as_one_of({"pass", "steer"}),
          node["token_ids"].list(as_int),
          node.has("videos") ? node["videos"].list(frames) : std::vector<std::vector<std::string>>(),
          node.has("prompt_ids") ? node["prompt_ids"].list(as_int) : std::vector<int64_t>(),
          node.has("seconds") ? node["seconds"].list(moments) : std::vector<std::vector<double>>()};
}

inline Tolerance tolerance(const Node& node) {
  node.object({"p_unsafe", "answers"});
  return {node["p_unsafe"].as_float(), node["answers"].as_int()};
}

inline SteeredState steered_state(const Node& node) {
  node.object({"token", "steered_token", "shift"});
  return {node["token"].as_int(), node["steered_token"].as_int(), node["shift"].as_float()};
}

inline DraftSpec drafts(const Node& node) {
  node.object({"file", "ngrams"});
  return {node["file"].as_string(), node["ngrams"].as_size()};
}

inline GateProof proof(const Node& node) {
  node.object({"file", "p_unsafe", "steered"}, {"monitor"});
  return {node["file"].as_string(), node["p_unsafe"].list(as_float), node["steered"].list(steered_state),
          node.has("monitor") ? node["monitor"].list(as_float) : std::vector<double>()};
}

/// Check the keys that only people read. They are not kept.
inline void check_facts(const Node& node) {
  const Node source = node["source"];
  source.object({"repo", "revision", "model_type", "licence"});
  source["repo"].as_string();
  source["model_type"].as_string();
  source["revision"].optional(as_string);
  source["licence"].optional(as_string);
  node["format_version"].as_int();  // refuses 2.0, which equals 2
  const Node kv_cache = node["kv_cache"];
  kv_cache.object({"dtype", "layout"});
  kv_cache["layout"].as_one_of({"BNSH"});
  for (const auto& [provider, checks] : node["validation"].entries()) {
    for (const Node& check : checks.items()) {
      check.object({"name", "value", "limit", "passed"});
      check["name"].as_string();
      check["value"].as_float();
      check["limit"].optional(as_float);
      check["passed"].as_bool();
    }
  }
  for (const auto& [package, version] : node["versions"].entries()) version.as_string();
}

inline Manifest manifest(const Node& node) {
  node.object(
      {"format_version", "source", "precision", "guarded", "split_layer", "dims", "graphs", "files", "kv_cache",
       "rotary", "prompt", "image", "prober", "refusal", "golden", "tolerance", "proof", "validation", "versions",
       "onnxruntime"},
      {"video", "monitor", "drafts", "manifest_sha256"});
  check_facts(node);
  Manifest manifest;
  if (node.has("manifest_sha256")) node["manifest_sha256"].as_string();
  manifest.guarded = node["guarded"].as_bool();
  manifest.split_layer = static_cast<int>(node["split_layer"].as_size());
  manifest.dims = dims(node["dims"]);
  manifest.cache_type = node["kv_cache"]["dtype"].as_one_of({"float32", "int8"});
  manifest.rotary = rotary(node["rotary"]);
  for (const auto& [name, value] : node["graphs"].entries()) manifest.graphs.emplace(name, graph(value));
  manifest.files = node["files"].list(data_file);
  manifest.prompt = prompt(node["prompt"]);
  manifest.image = node["image"].optional(image);
  if (node.has("video")) manifest.video = node["video"].optional(video);
  manifest.prober = node["prober"].optional(prober);
  manifest.refusal = node["refusal"].optional(refusal);
  if (node.has("monitor")) manifest.monitor = node["monitor"].optional(monitor);
  if (node.has("drafts")) manifest.drafts = node["drafts"].optional(drafts);
  manifest.golden = node["golden"].list(golden);
  manifest.tolerance = tolerance(node["tolerance"]);
  manifest.proof = node["proof"].optional(proof);
  manifest.onnxruntime = node["onnxruntime"].as_string();
  manifest.precision = as_precision(node["precision"]);
  if (node["versions"].has("pillow")) manifest.pillow = node["versions"]["pillow"].as_string();
  return manifest;
}

}  // namespace autosteer::decoding
