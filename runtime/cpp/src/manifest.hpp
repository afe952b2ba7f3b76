// autosteer.json, read as strictly as runtime/manifest.py reads it. Unknown keys, missing keys, wrong types, a wrong
// hash and a path that leaves the folder are each a PackageError: a runtime that ignored a key might run the gate
// wrongly. The structs are the Python dataclasses; docs/embedding.md explains every field.
//
// split_layer = k: decoder_lower runs layers 0..k-1, the prober reads what enters layer k, decoder_upper runs k..N-1.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "digest.hpp"
#include "errors.hpp"
#include "unicode.hpp"

namespace autosteer {

using Json = nlohmann::json;
using OrderedJson = nlohmann::ordered_json;

template <class T>
OrderedJson or_null(const std::optional<T>& value) {
  return value ? OrderedJson(*value) : OrderedJson(nullptr);
}
namespace fs = std::filesystem;

constexpr int kFormatVersion = 2;
constexpr double kMaxPUnsafeTolerance = 0.05;  // scores that differ more are not the measured gate's
constexpr const char* kManifestFile = "autosteer.json";
/// A package has both or neither.
inline const std::map<std::string, std::string> kPrefillGraphs = {{"decoder_lower", "prefill_lower"},
                                                                  {"decoder_upper", "prefill_upper"}};

/// Every graph that a package may have.
inline const std::set<std::string> kGraphs = {"embed_tokens",  "decoder_lower", "decoder_upper",  "lm_head",
                                              "prober",        "refusal_head",  "vision_encoder", "image_tokenizer",
                                              "prefill_lower", "prefill_upper"};

/// Exactly one, if the model takes images; and the output that it gives for each tile.
inline const std::map<std::string, std::string> kImageGraphs = {{"vision_encoder", "image_features"},
                                                                {"image_tokenizer", "input_ids"}};

struct Dims {
  int64_t hidden_size, num_hidden_layers, num_key_value_heads, head_dim, vocab_size;
  int64_t context_length;  ///< most tokens of a prompt and its answer together
};

using Dimension = std::variant<int64_t, std::string>;  ///< a size, or the name of a symbolic one

struct TensorSpec {
  std::string name, dtype;  ///< dtype: numpy's name
  std::vector<Dimension> shape;

  bool operator==(const TensorSpec& other) const {
    return name == other.name && dtype == other.dtype && shape == other.shape;
  }
};

struct GraphSpec {
  std::string file, sha256;
  std::vector<TensorSpec> inputs, outputs;
  std::optional<std::array<int64_t, 2>> layers;  ///< decoder halves: first layer, one past the last
  std::string precision;                         ///< fp32, fp16, int8 or int4
};

struct DataFile {
  std::string file, sha256;
  int64_t bytes;
};

/// How image kind "anyres" cuts one image into tiles and lays their features out among the tokens.
struct AnyresSpec {
  int64_t tokens_per_side;                             ///< image_features of one tile: tokens_per_side ** 2 rows
  std::vector<std::array<int64_t, 2>> grid_pinpoints;  ///< (height, width) in pixels
  int64_t max_tiles_side;                              ///< larger feature grids are shrunk to about this many tiles
};

/// How image kind "split" cuts an image into tiles, and adds the whole image as one more.
struct SplitSpec {
  int64_t longest_edge;  ///< pixels; every picture is scaled to it first
  bool tiles;            ///< false: only the whole image
};

/// The token ids around and between the tiles of an image that was cut into `grid` (rows, columns).
struct TileSeparators {
  std::array<int64_t, 2> grid;
  std::vector<std::vector<int64_t>> token_ids;  ///< [i]: before the rows of tile i; the last: after all tiles
};

/// How an RGB image becomes pixel_values. `vision_encoder` turns them into rows, `image_tokenizer` into token ids.
struct ImageSpec {
  std::string kind;   ///< anyres, centre_crop or split
  int64_t tile_size;  ///< pixels; the image graph's input is (tiles, 3, tile_size, tile_size)
  std::array<double, 3> mean, std;
  double rescale_factor;
  std::string resample;  ///< nearest, lanczos, bilinear or bicubic: Pillow's
  std::optional<AnyresSpec> anyres;
  std::optional<SplitSpec> split;
  std::vector<TileSeparators> tile_separators;  ///< one for each grid; empty: no separators
};

/// How a video's frames become pixel_values, and the vision_encoder's features become rows (see video.hpp).
struct VideoSpec {
  std::array<double, 3> mean, std;
  double rescale_factor;
  int64_t pooled_side;  ///< tokens_per_side ** 2 rows of a frame are pooled to pooled_side ** 2
};

/// One piece of the chat template (see text.hpp).
struct TemplatePiece {
  std::string kind;  ///< token, literal, text, image or video
  std::string text;
  int64_t id = -1;
};

struct TurnSpec {
  std::vector<TemplatePiece> prefix, image, text, suffix;
  std::vector<TemplatePiece> lead;  ///< after the prefix, if the turn's first part is a text
  std::vector<TemplatePiece> video;
};

struct PromptSpec {
  std::vector<TemplatePiece> begin;  ///< opens a dialogue without a system turn
  std::optional<TurnSpec> system;
  TurnSpec user, assistant;
  std::vector<TemplatePiece> generation;  ///< opens the answer
  bool images_first;                      ///< reorder a turn's parts: images, videos, texts
  bool strip_text;                        ///< strip white space around a turn's text
  std::vector<int64_t> end_token_ids;
  std::string tokenizer = "tokenizer.json";
};

struct ProberSpec {
  int64_t token_offset;  ///< position of hidden_states that it reads, from the end of the prompt
  std::string pooling;   ///< "last": that position; "mean": over it and all text positions of the turn before it
  double threshold;      ///< safe = 0 <= p_unsafe <= threshold
};

struct RefusalSpec {
  double strength;
  std::string text;  ///< the answer to an unsafe prompt under --policy stop
};

struct Golden {
  std::string prompt;
  std::vector<std::string> images;
  std::optional<double> threshold, p_unsafe;
  std::string action;              ///< pass or steer
  std::vector<int64_t> token_ids;  ///< of the answer; if the action is steer, the unsteered answer differs
  std::vector<std::vector<std::string>> videos;  ///< the frames of each
  std::vector<int64_t> prompt_ids;               ///< token ids of the rendered prompt, instead of `prompt`
};

/// How far results on another machine may differ from the golden ones.
struct Tolerance {
  double p_unsafe;  ///< largest difference
  int64_t answers;  ///< how many golden answers may differ
};

/// lm_head's output for one hidden state, unsteered, and steered at the package's strength.
struct SteeredState {
  int64_t token, steered_token;  ///< the most likely; the most likely after steering, always another one
  double shift;                  ///< root mean square over the vocabulary of what steering adds to the logits
};

/// Hidden states and the gate's outputs for them. `file` holds little-endian float32 vectors of hidden_size: what the
/// prober read of a prompt, one for each of `p_unsafe`; the last hidden state of a prompt, one for each of `steered`;
/// and the same after the Refusal Head.
struct GateProof {
  std::string file;
  std::vector<double> p_unsafe;
  std::vector<SteeredState> steered;
};

struct Manifest {
  bool guarded;
  int split_layer;
  Dims dims;
  std::string cache_type;  ///< numpy's name for the type of the caches: float32 or int8
  std::map<std::string, GraphSpec> graphs;
  std::vector<DataFile> files;
  PromptSpec prompt;
  std::optional<ImageSpec> image;
  std::optional<VideoSpec> video;
  std::optional<ProberSpec> prober;
  std::optional<RefusalSpec> refusal;
  std::vector<Golden> golden;
  Tolerance tolerance;
  std::optional<GateProof> proof;  ///< if guarded
  std::string onnxruntime;         ///< the oldest version that computes this package correctly, for example "1.23"
  std::string precision;           ///< of the weights: fp32, fp16, int8 or int4

  /// Whether all machines give the same tokens: no int8 or int4 weights or caches.
  bool exact() const {
    const auto is_exact = [](const std::string& p) { return p == "fp32" || p == "fp16"; };
    return cache_type == "float32" && is_exact(precision) &&
           std::all_of(graphs.begin(), graphs.end(), [&](const auto& g) { return is_exact(g.second.precision); });
  }

  /// Read and check autosteer.json of `folder`; files are checked by `verify`.
  static Manifest load(const fs::path& folder);

  /// The graph that runs prefill for a decoder half: its copy at another precision, or else the half itself.
  std::string prefill_graph(const std::string& half) const {
    const std::string& copy = kPrefillGraphs.at(half);
    return graphs.count(copy) > 0 ? copy : half;
  }

  /// sha256 of every file of the package, by relative path.
  std::map<std::string, std::string> paths() const;

  /// Compare every file with its hash. Throws PackageError naming the first that is missing or differs.
  void verify(const fs::path& folder) const;
};

namespace decoding {

constexpr int kMaxDepth = 64;  // of arrays and objects in each other: deeper ones would overflow the stack elsewhere

/// Refuse an array or object that begins `depth` levels deep.
inline void check_depth(int depth, Json::parse_event_t event) {
  const bool opens = event == Json::parse_event_t::array_start || event == Json::parse_event_t::object_start;
  if (opens && depth >= kMaxDepth) throw PackageError("nested deeper than " + std::to_string(kMaxDepth) + " levels");
}

/// The beginning of a value's text, for errors.
inline std::string shown(const Json& value) {
  return unicode::first_of(value.dump(-1, ' ', false, Json::error_handler_t::replace), 60);
}

/// A JSON value and its path. Each `as_...` throws PackageError if the value does not fit.
class Node {
 public:
  Node(const Json& data, std::string where) : data_(data), where_(std::move(where)) {}

  [[noreturn]] void fail(const std::string& what) const { throw PackageError(where_ + ": " + what); }

  /// Check that this is an object with all `required` keys, and no others but `optional` ones.
  const Node& object(const std::vector<std::string>& required, const std::vector<std::string>& optional = {}) const {
    if (!data_.is_object()) fail("expected an object");
    for (const auto& item : data_.items()) {
      if (!contains(required, item.key()) && !contains(optional, item.key())) fail("unknown key '" + item.key() + "'");
    }
    for (const auto& key : required) {
      if (!data_.contains(key)) fail("missing key '" + key + "'");
    }
    return *this;
  }

  bool has(const std::string& key) const { return data_.contains(key); }
  bool is_null() const { return data_.is_null(); }
  bool is_string() const { return data_.is_string(); }
  Node operator[](const std::string& key) const { return {data_.at(key), where_ + ": " + key}; }

  std::string as_string() const {
    if (!data_.is_string()) misfit("str");
    return data_.get<std::string>();
  }

  std::string as_one_of(const std::vector<std::string>& words) const {
    if (!data_.is_string() || !contains(words, data_.get<std::string>())) misfit("one of a fixed set");
    return data_.get<std::string>();
  }

  bool as_bool() const {
    if (!data_.is_boolean()) misfit("bool");
    return data_.get<bool>();
  }

  int64_t as_int() const {
    if (!data_.is_number_integer() || (data_.is_number_unsigned() && data_.get<uint64_t>() > INT64_MAX)) misfit("int");
    return data_.get<int64_t>();
  }

  /// A size: at least 1, and small enough that products of sizes do not overflow.
  int64_t as_size() const {
    const int64_t value = as_int();
    if (value < 1 || value > INT32_MAX) misfit("a size");
    return value;
  }

  double as_float() const {
    if (!data_.is_number() || !std::isfinite(data_.get<double>())) misfit("float");
    return data_.get<double>();
  }

  /// Elements of an array.
  std::vector<Node> items() const {
    if (!data_.is_array()) misfit("tuple");
    std::vector<Node> nodes;
    for (size_t i = 0; i < data_.size(); ++i) nodes.emplace_back(data_[i], where_ + "[" + std::to_string(i) + "]");
    return nodes;
  }

  /// Elements of an object with any keys.
  std::vector<std::pair<std::string, Node>> entries() const {
    if (!data_.is_object()) misfit("dict");
    std::vector<std::pair<std::string, Node>> nodes;
    for (const auto& item : data_.items()) nodes.emplace_back(item.key(), (*this)[item.key()]);
    return nodes;
  }

  /// A fixed number of elements, each read by `read`.
  template <size_t N, class Read>
  auto tuple(Read read) const {
    const auto nodes = items();
    if (nodes.size() != N) misfit("tuple");
    std::array<decltype(read(nodes[0])), N> values{};
    for (size_t i = 0; i < N; ++i) values[i] = read(nodes[i]);
    return values;
  }

  /// Any number of elements, each read by `read`.
  template <class Read>
  auto list(Read read) const {
    std::vector<decltype(read(*this))> values;
    for (const Node& node : items()) values.push_back(read(node));
    return values;
  }

  /// Nothing if the value is null.
  template <class Read>
  auto optional(Read read) const {
    using Value = decltype(read(*this));
    return is_null() ? std::optional<Value>() : std::optional<Value>(read(*this));
  }

 private:
  static bool contains(const std::vector<std::string>& words, const std::string& word) {
    return std::find(words.begin(), words.end(), word) != words.end();
  }

  [[noreturn]] void misfit(const char* expected) const {
    fail(shown(data_) + " does not fit (expected " + expected + ")");
  }

  const Json& data_;
  std::string where_;
};

inline std::string as_string(const Node& node) {
  return node.as_string();
}
inline int64_t as_int(const Node& node) {
  return node.as_int();
}
inline int64_t as_size(const Node& node) {
  return node.as_size();
}
inline double as_float(const Node& node) {
  return node.as_float();
}
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

inline AnyresSpec anyres(const Node& node) {
  node.object({"tokens_per_side", "grid_pinpoints", "max_tiles_side"});
  const auto pinpoint = [](const Node& sizes) { return sizes.tuple<2>(as_size); };
  return {node["tokens_per_side"].as_size(), node["grid_pinpoints"].list(pinpoint), node["max_tiles_side"].as_size()};
}

inline SplitSpec split(const Node& node) {
  node.object({"longest_edge", "tiles"});
  return {node["longest_edge"].as_size(), node["tiles"].as_bool()};
}

inline TileSeparators tile_separators(const Node& node) {
  node.object({"grid", "token_ids"});
  return {node["grid"].tuple<2>(as_int), node["token_ids"].list([](const Node& ids) { return ids.list(as_int); })};
}

inline ImageSpec image(const Node& node) {
  node.object({"kind", "tile_size", "mean", "std", "rescale_factor", "resample", "anyres"},
              {"split", "tile_separators"});
  ImageSpec spec{node["kind"].as_one_of({"anyres", "centre_crop", "split"}),
                 node["tile_size"].as_size(),
                 node["mean"].tuple<3>(as_float),
                 node["std"].tuple<3>(as_float),
                 node["rescale_factor"].as_float(),
                 node["resample"].as_one_of({"nearest", "lanczos", "bilinear", "bicubic"}),
                 node["anyres"].optional(anyres),
                 {},
                 {}};
  if (node.has("split")) spec.split = node["split"].optional(split);
  if (node.has("tile_separators")) spec.tile_separators = node["tile_separators"].list(tile_separators);
  if ((spec.kind == "anyres") != spec.anyres.has_value()) node.fail("'kind' and 'anyres' differ");
  if ((spec.kind == "split") != spec.split.has_value()) node.fail("'kind' and 'split' differ");
  if (spec.split && spec.split->longest_edge > 1 << 14) node.fail("longest_edge is too large");
  if (spec.tile_size > 1 << 14) node.fail("tile_size is too large");
  if (std::count(spec.std.begin(), spec.std.end(), 0.0)) node.fail("std is zero");
  if (!spec.anyres) return spec;
  if (spec.anyres->grid_pinpoints.empty()) node.fail("grid_pinpoints must be given");
  for (const auto& [height, width] : spec.anyres->grid_pinpoints) {
    if (height % spec.tile_size || width % spec.tile_size) node.fail("grid_pinpoints must be whole tiles");
    if (height > 1 << 16 || width > 1 << 16) node.fail("a grid is too large");
  }
  return spec;
}

inline VideoSpec video(const Node& node) {
  node.object({"mean", "std", "rescale_factor", "pooled_side"});
  VideoSpec spec{node["mean"].tuple<3>(as_float), node["std"].tuple<3>(as_float), node["rescale_factor"].as_float(),
                 node["pooled_side"].as_size()};
  if (std::count(spec.std.begin(), spec.std.end(), 0.0)) node.fail("std is zero");
  return spec;
}

inline TemplatePiece piece(const Node& node) {
  node.object({"kind"}, {"text", "id"});
  TemplatePiece piece;
  piece.kind = node["kind"].as_one_of({"token", "literal", "text", "image", "video"});
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

inline PromptSpec prompt(const Node& node) {
  node.object({"begin", "system", "user", "assistant", "generation", "images_first", "strip_text", "end_token_ids"},
              {"tokenizer"});
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
  return spec;
}

inline ProberSpec prober(const Node& node) {
  node.object({"token_offset", "pooling", "threshold", "calibration"});
  for (const auto& [key, value] : node["calibration"].entries()) value.as_float();
  return {node["token_offset"].as_int(), node["pooling"].as_one_of({"last", "mean"}), node["threshold"].as_float()};
}

inline RefusalSpec refusal(const Node& node) {
  node.object({"strength", "text"}, {"formula"});
  if (node.has("formula")) node["formula"].as_string();
  return {node["strength"].as_float(), node["text"].as_string()};
}

inline Golden golden(const Node& node) {
  node.object({"prompt", "images", "threshold", "p_unsafe", "action", "token_ids"}, {"videos", "prompt_ids"});
  const auto frames = [](const Node& files) { return files.list(as_string); };
  return {node["prompt"].as_string(),
          node["images"].list(as_string),
          node["threshold"].optional(as_float),
          node["p_unsafe"].optional(as_float),
          node["action"].as_one_of({"pass", "steer"}),
          node["token_ids"].list(as_int),
          node.has("videos") ? node["videos"].list(frames) : std::vector<std::vector<std::string>>(),
          node.has("prompt_ids") ? node["prompt_ids"].list(as_int) : std::vector<int64_t>()};
}

inline Tolerance tolerance(const Node& node) {
  node.object({"p_unsafe", "answers"});
  return {node["p_unsafe"].as_float(), node["answers"].as_int()};
}

inline SteeredState steered_state(const Node& node) {
  node.object({"token", "steered_token", "shift"});
  return {node["token"].as_int(), node["steered_token"].as_int(), node["shift"].as_float()};
}

inline GateProof proof(const Node& node) {
  node.object({"file", "p_unsafe", "steered"});
  return {node["file"].as_string(), node["p_unsafe"].list(as_float), node["steered"].list(steered_state)};
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
       "prompt", "image", "prober", "refusal", "golden", "tolerance", "proof", "validation", "versions", "onnxruntime"},
      {"video"});
  check_facts(node);
  Manifest manifest;
  manifest.guarded = node["guarded"].as_bool();
  manifest.split_layer = static_cast<int>(node["split_layer"].as_size());
  manifest.dims = dims(node["dims"]);
  manifest.cache_type = node["kv_cache"]["dtype"].as_one_of({"float32", "int8"});
  for (const auto& [name, value] : node["graphs"].entries()) manifest.graphs.emplace(name, graph(value));
  manifest.files = node["files"].list(data_file);
  manifest.prompt = prompt(node["prompt"]);
  manifest.image = node["image"].optional(image);
  if (node.has("video")) manifest.video = node["video"].optional(video);
  manifest.prober = node["prober"].optional(prober);
  manifest.refusal = node["refusal"].optional(refusal);
  manifest.golden = node["golden"].list(golden);
  manifest.tolerance = tolerance(node["tolerance"]);
  manifest.proof = node["proof"].optional(proof);
  manifest.onnxruntime = node["onnxruntime"].as_string();
  manifest.precision = as_precision(node["precision"]);
  return manifest;
}

inline bool leaves_package(const std::string& file) {
  const fs::path path(file);
  const bool climbs = std::find(path.begin(), path.end(), fs::path("..")) != path.end();
  return file.empty() || path.is_absolute() || climbs ||
         file.find_first_of(std::string("\\\0", 2)) != std::string::npos;
}

constexpr int64_t kAnySize = -1;  // in the shape of an expected tensor

/// The inputs that the loop binds, and the outputs that it reads. A graph has no others.
struct Tensors {
  std::vector<TensorSpec> inputs, outputs;
};

/// The tensors of the image graph. How many rows or ids it gives for a tile is its own affair.
inline Tensors expected_of_images(const Manifest& m, const std::string& name) {
  const ImageSpec& image = m.image.value();
  Tensors tensors{{{"pixel_values", "float32", {"tiles", 3, image.tile_size, image.tile_size}}}, {}};
  if (name == "image_tokenizer") {
    tensors.outputs = {{"input_ids", "int64", {kAnySize, kAnySize}}};
  } else {
    tensors.outputs = {{"image_features", "float32", {kAnySize, kAnySize, m.dims.hidden_size}}};
    if (image.anyres) tensors.outputs.push_back({"image_newline", "float32", {m.dims.hidden_size}});
  }
  return tensors;
}

/// The tensors of each graph.
inline std::map<std::string, Tensors> expected_tensors(const Manifest& m) {
  const Dims& d = m.dims;
  const std::string n = "sequence_length", f32 = "float32";
  const std::vector<Dimension> rows = {1, n, d.hidden_size}, last = {1, "num_logits", d.hidden_size};
  const auto half = [&](const char* name, const char* source, const char* target, const std::vector<Dimension>& out) {
    Tensors tensors{{{source, f32, rows}, {"seqlens_k", "int32", {1}}, {"total_sequence_length", "int32", {}}},
                    {{target, f32, out}}};
    const auto [first, end] = m.graphs.at(name).layers.value();
    for (int64_t layer = first; layer < end; ++layer) {
      for (const char* kind : {"key", "value"}) {
        const std::string suffix = "." + std::to_string(layer) + "." + kind;
        tensors.inputs.push_back(
            {"past_key_values" + suffix, m.cache_type, {1, d.num_key_value_heads, "past_sequence_length", d.head_dim}});
        tensors.outputs.push_back(
            {"present" + suffix, m.cache_type, {1, d.num_key_value_heads, "total_sequence_length", d.head_dim}});
      }
    }
    return tensors;
  };
  std::map<std::string, Tensors> expected = {
      {"embed_tokens", {{{"input_ids", "int64", {1, n}}}, {{"inputs_embeds", f32, rows}}}},
      {"decoder_lower", half("decoder_lower", "inputs_embeds", "hidden_states", rows)},
      {"decoder_upper", half("decoder_upper", "hidden_states", "last_hidden_state", last)},
      {"lm_head", {{{"last_hidden_state", f32, last}}, {{"logits", f32, {1, "num_logits", d.vocab_size}}}}}};
  expected["decoder_upper"].inputs.push_back({"num_logits", "int64", {1}});
  for (const auto& [name, copy] : kPrefillGraphs) expected[m.prefill_graph(name)] = expected.at(name);
  if (m.guarded) {
    expected["prober"] = {{{"hidden_states", f32, {1, d.hidden_size}}}, {{"p_unsafe", f32, {1}}}};
    expected["refusal_head"] = {{{"last_hidden_state", f32, last}, {"strength", f32, {1}}},
                                {{"steered_hidden_state", f32, last}}};
  }
  for (const auto& [name, output] : kImageGraphs) {
    if (m.graphs.count(name)) expected[name] = expected_of_images(m, name);
  }
  return expected;
}

/// The turns of all roles that the model has.
inline std::vector<const TurnSpec*> turns(const PromptSpec& prompt) {
  std::vector<const TurnSpec*> turns = {&prompt.user, &prompt.assistant};
  if (prompt.system) turns.push_back(&*prompt.system);
  return turns;
}

/// Every piece that is not inside a part of a turn.
inline std::vector<TemplatePiece> outside(const PromptSpec& prompt) {
  std::vector<TemplatePiece> all = prompt.begin;
  const auto add = [&](const std::vector<TemplatePiece>& more) { all.insert(all.end(), more.begin(), more.end()); };
  for (const TurnSpec* turn : turns(prompt)) {
    for (const auto* part : {&turn->prefix, &turn->lead, &turn->suffix}) add(*part);
  }
  add(prompt.generation);
  return all;
}

/// Whether `text` is "major.minor", for example "1.23".
inline bool is_version(const std::string& text) {
  const size_t dot = text.find('.');
  const auto is_number = [](const std::string& part) {
    return !part.empty() && part.size() <= 4 && part.find_first_not_of("0123456789") == std::string::npos;
  };
  return dot != std::string::npos && is_number(text.substr(0, dot)) && is_number(text.substr(dot + 1));
}

/// (kind, pieces) of every part that a turn can have. Turns that take no images or videos have none of them.
inline std::vector<std::pair<std::string, std::vector<TemplatePiece>>> inside(const PromptSpec& prompt) {
  std::vector<std::pair<std::string, std::vector<TemplatePiece>>> parts;
  for (const TurnSpec* turn : turns(prompt)) {
    if (!turn->image.empty()) parts.emplace_back("image", turn->image);
    if (!turn->video.empty()) parts.emplace_back("video", turn->video);
    parts.emplace_back("text", turn->text);
  }
  return parts;
}

/// Every piece of the template.
inline std::vector<TemplatePiece> pieces(const PromptSpec& prompt) {
  std::vector<TemplatePiece> all = outside(prompt);
  for (const auto& [kind, part] : inside(prompt)) all.insert(all.end(), part.begin(), part.end());
  return all;
}

/// (file, hash) of every entry; a file may have several.
inline std::vector<std::pair<std::string, std::string>> hashes(const Manifest& m) {
  std::vector<std::pair<std::string, std::string>> all;
  for (const auto& [name, spec] : m.graphs) all.emplace_back(spec.file, spec.sha256);
  for (const auto& spec : m.files) all.emplace_back(spec.file, spec.sha256);
  return all;
}

using Need = std::function<void(bool condition, const std::string& what)>;

/// Whether a tensor has the expected type and shape.
inline bool fits(const TensorSpec& found, const TensorSpec& expected) {
  const auto is_size = [](const Dimension& size, const Dimension& wanted) {
    return wanted == Dimension(kAnySize) || size == wanted;
  };
  return found.dtype == expected.dtype &&
         std::equal(found.shape.begin(), found.shape.end(), expected.shape.begin(), expected.shape.end(), is_size);
}

/// Check that the inputs or the outputs of a graph are the expected ones, in any order.
inline void check_tensors(const std::vector<TensorSpec>& expected, const std::vector<TensorSpec>& found,
                          const std::string& graph, const Need& need) {
  const auto named = [](const std::vector<TensorSpec>& tensors, const std::string& name) {
    return std::find_if(tensors.begin(), tensors.end(), [&](const TensorSpec& t) { return t.name == name; });
  };
  for (const TensorSpec& tensor : expected) {
    const auto known = named(found, tensor.name);
    need(known != found.end(), graph + " has no '" + tensor.name + "'");
    need(fits(*known, tensor), graph + ": '" + tensor.name + "' is not of the shape and type that 'dims' says");
  }
  for (const TensorSpec& tensor : found) {
    need(named(expected, tensor.name) != expected.end(),
         graph + ": this runtime has no use for '" + tensor.name + "'");
  }
  need(found.size() == expected.size(), graph + " has two tensors of one name");
}

inline void check_consistency(const Manifest& m, const std::string& where) {
  const auto need = [&](bool condition, const std::string& what) {
    if (!condition) throw PackageError(where + ": " + what);
  };
  std::vector<std::string> graphs = {"embed_tokens", "decoder_lower", "decoder_upper", "lm_head"};
  if (m.guarded) graphs.insert(graphs.end(), {"prober", "refusal_head"});
  for (const auto& name : graphs) {
    need(m.graphs.count(name) > 0, "graph '" + name + "' is missing; the package cannot run without it");
  }
  for (const auto& [name, graph] : m.graphs) {
    need(kGraphs.count(name) > 0,
         "this runtime has no use for graph " + name + "; without it answers might not be the package's");
  }
  need(m.graphs.count("vision_encoder") + m.graphs.count("image_tokenizer") == (m.image ? 1 : 0),
       "'image' comes with one graph of vision_encoder, image_tokenizer");
  need(m.guarded == m.prober.has_value() && m.guarded == m.refusal.has_value(),
       "'guarded', 'prober' and 'refusal' contradict each other");
  const int64_t k = m.split_layer, n = m.dims.num_hidden_layers;
  using Layers = std::array<int64_t, 2>;
  need(0 < k && k < n, "split_layer " + std::to_string(k) + " is not between 1 and " + std::to_string(n - 1));
  need(m.graphs.count("prefill_lower") == m.graphs.count("prefill_upper"),
       "of prefill_lower and prefill_upper there are both or neither");
  for (const auto& [half, layers] : {std::pair{"decoder_lower", Layers{0, k}}, {"decoder_upper", Layers{k, n}}}) {
    for (const std::string& name : {std::string(half), m.prefill_graph(half)}) {
      need(m.graphs.at(name).layers == layers,
           name + " must hold layers " + std::to_string(layers[0]) + " to " + std::to_string(layers[1] - 1));
    }
  }
  if (m.prober && m.refusal) {
    need(0.0 <= m.prober->threshold && m.prober->threshold < 1.0, "prober: threshold is not from 0 to 1");
    need(m.prober->token_offset < 0, "prober: token_offset counts from the end of the prompt: below zero");
    need(m.refusal->strength > 0.0, "refusal: strength must be above zero, or nothing is steered");
    need(!strip(m.refusal->text).empty(), "refusal: text is empty");
  }
  const auto paths = m.paths();
  for (const auto& [file, hash] : paths) need(!leaves_package(file), "path '" + file + "' leaves the package");
  for (const auto& [file, hash] : hashes(m)) need(paths.at(file) == hash, "'" + file + "' has two hashes");
  const auto need_hash = [&](const std::string& file) {
    need(paths.count(file) > 0, "'" + file + "' is used but has no hash in 'files'");
  };
  const auto in_vocabulary = [&](const std::vector<int64_t>& ids) {
    return std::all_of(ids.begin(), ids.end(), [&](int64_t id) { return 0 <= id && id < m.dims.vocab_size; });
  };
  need_hash(m.prompt.tokenizer);
  for (const Golden& golden : m.golden) {
    for (const auto& file : golden.images) need_hash(file);
    for (const auto& frames : golden.videos) {
      for (const auto& file : frames) need_hash(file);
    }
    need(!golden.token_ids.empty(), "golden: an answer without tokens");
    need(golden.prompt_ids.empty() || (golden.prompt.empty() && golden.images.empty() && golden.videos.empty()),
         "golden: a prompt is given twice");
    need(in_vocabulary(golden.token_ids) && in_vocabulary(golden.prompt_ids), "golden: an id outside the vocabulary");
  }
  need(0.0 < m.tolerance.p_unsafe && m.tolerance.p_unsafe <= kMaxPUnsafeTolerance,
       "tolerance: p_unsafe is not above 0, up to 0.05");
  need(0 <= m.tolerance.answers && m.tolerance.answers <= static_cast<int64_t>(m.golden.size()),
       "tolerance: more answers than golden prompts");
  need(m.guarded == m.proof.has_value(), "'guarded' and 'proof' contradict each other");
  if (m.proof) {
    const auto is_p = [](double p) { return 0.0 <= p && p <= 1.0; };
    need(!m.proof->p_unsafe.empty(), "proof: no hidden state for the prober");
    need(std::all_of(m.proof->p_unsafe.begin(), m.proof->p_unsafe.end(), is_p), "proof: a p_unsafe is not from 0 to 1");
    need(!m.proof->steered.empty(), "proof: no hidden state for the Refusal Head");
    for (const SteeredState& state : m.proof->steered) {
      need(in_vocabulary({state.token, state.steered_token}), "proof: an id outside the vocabulary");
      need(state.token != state.steered_token, "proof: a state whose token steering leaves as it was proves nothing");
      need(state.shift > 0.0, "proof: a shift is not above zero");
    }
    const auto states = static_cast<int64_t>(m.proof->p_unsafe.size() + 2 * m.proof->steered.size());
    const int64_t size = 4 * m.dims.hidden_size * states;
    const auto described =
        std::find_if(m.files.begin(), m.files.end(), [&](const DataFile& file) { return file.file == m.proof->file; });
    need(described != m.files.end() && described->bytes == size,
         "proof: '" + m.proof->file + "' must be in 'files' with " + std::to_string(size) + " bytes");
  }
  need(is_version(m.onnxruntime), "onnxruntime: '" + m.onnxruntime + "' is not a version like '1.23'");
  const auto is_slot = [](const TemplatePiece& piece) { return piece.kind != "token" && piece.kind != "literal"; };
  for (const TemplatePiece& piece : outside(m.prompt)) {
    need(!is_slot(piece), "prompt: a piece '" + piece.kind + "' stands where no part of a turn goes");
  }
  for (const auto& [kind, part] : inside(m.prompt)) {
    const auto first = std::find_if(part.begin(), part.end(), is_slot);
    need(first != part.end() && first->kind == kind && std::count_if(part.begin(), part.end(), is_slot) == 1,
         "prompt: a turn's '" + kind + "' must have one piece of that kind and no other");
  }
  bool written = false;
  for (const TemplatePiece& piece : pieces(m.prompt)) {
    written = written || piece.kind == "video";
    need(piece.kind != "token" || (0 <= piece.id && piece.id < m.dims.vocab_size),
         "prompt: '" + piece.text + "' has id " + std::to_string(piece.id) + "; the vocabulary ends at " +
             std::to_string(m.dims.vocab_size - 1));
  }
  need(m.video.has_value() == written, "'video' and the prompt's pieces of that kind come together");
  if (m.video) {
    need(m.image && m.image->anyres && m.graphs.count("vision_encoder"),
         "'video' comes with 'anyres' images and a vision_encoder");
    need(m.video->pooled_side <= m.image->anyres->tokens_per_side, "video: pooled_side is above tokens_per_side");
  }
  std::set<std::array<int64_t, 2>> grids;
  for (const TileSeparators& separators : m.image ? m.image->tile_separators : std::vector<TileSeparators>()) {
    need(grids.insert(separators.grid).second, "image: two tile_separators for one grid");
    for (const auto& ids : separators.token_ids) {
      need(in_vocabulary(ids), "image: tile_separators have an id outside the vocabulary");
    }
  }
  for (const auto& [name, expected] : expected_tensors(m)) {
    const GraphSpec& graph = m.graphs.at(name);
    check_tensors(expected.inputs, graph.inputs, "graph '" + name + "'", need);
    check_tensors(expected.outputs, graph.outputs, "graph '" + name + "'", need);
  }
}

/// Parse JSON. Throws PackageError for a key given twice or a byte order mark, which parsers treat differently, for a
/// zero byte, at which this parser would stop, and for more than kMaxDepth levels.
inline Json parse_strictly(std::istream& file) {
  const std::string text{std::istreambuf_iterator<char>(file), {}};
  if (text.compare(0, 3, "\xEF\xBB\xBF") == 0) throw PackageError("it begins with a byte order mark");
  if (text.find('\0') != std::string::npos) throw PackageError("it has a zero byte");
  std::vector<std::set<std::string>> open;  // keys seen so far, for each object being parsed
  return Json::parse(text, [&](int depth, Json::parse_event_t event, Json& value) {
    check_depth(depth, event);
    if (event == Json::parse_event_t::object_start) open.emplace_back();
    if (event == Json::parse_event_t::object_end) open.pop_back();
    if (event == Json::parse_event_t::key && !open.back().insert(value.get<std::string>()).second) {
      throw PackageError("key '" + value.get<std::string>() + "' is given twice");
    }
    return true;
  });
}

}  // namespace decoding

inline Manifest Manifest::load(const fs::path& folder) {
  const fs::path path = folder / kManifestFile;
  std::error_code ignored;
  if (!fs::exists(path, ignored)) {
    throw PackageError(folder.string() + ": no " + kManifestFile + " here; is this a folder made by autosteer-export?");
  }
  if (!fs::is_regular_file(path, ignored)) {  // never wait for a pipe
    throw PackageError(path.string() + ": not readable as JSON (not a file)");
  }
  Json data;
  try {
    std::ifstream file(path, std::ios::binary);
    data = decoding::parse_strictly(file);
  } catch (const Json::parse_error& err) {  // its message would quote the file's bytes
    throw PackageError(path.string() + ": not readable as JSON (at byte " + std::to_string(err.byte) + ")");
  } catch (const std::exception& err) {
    throw PackageError(path.string() + ": not readable as JSON (" + err.what() + ")");
  }
  const Json version = data.is_object() && data.contains("format_version") ? data["format_version"] : Json();
  if (version != kFormatVersion) {
    throw PackageError(path.string() + ": format_version " + decoding::shown(version) + ", this runtime reads " +
                       std::to_string(kFormatVersion) + "; export the model again");
  }
  Manifest manifest = decoding::manifest({data, path.string()});
  decoding::check_consistency(manifest, path.string());
  return manifest;
}

inline std::map<std::string, std::string> Manifest::paths() const {
  const auto all = decoding::hashes(*this);
  return {all.begin(), all.end()};
}

inline void Manifest::verify(const fs::path& folder) const {
  std::error_code unknown;
  if (paths().count("weights.bin") == 0 && fs::exists(folder / "weights.bin", unknown)) {
    throw PackageError((folder / "weights.bin").string() + ": has no hash in " + kManifestFile +
                       "; export the package again");
  }
  for (const auto& [file, expected] : paths()) {
    const fs::path path = folder / file;
    if (std::error_code ignored; !fs::is_regular_file(path, ignored)) {
      throw PackageError(path.string() + ": missing; export the package again or copy it again");
    }
    if (sha256(path) != expected) {
      throw PackageError(path.string() + ": sha256 differs from " + kManifestFile +
                         " (package damaged or edited); export it again or copy it again");
    }
  }
}

}  // namespace autosteer
