// autosteer.json, read as strictly as runtime/manifest.py reads it: unknown keys, missing keys, wrong types, a wrong
// hash, a path that leaves the folder are all a PackageError, because a manifest that is half understood is a gate that
// is half closed. The structs are the Python dataclasses; every field is explained in docs/embedding.md.
//
// split_layer = k: decoder_lower runs layers 0..k-1, the prober reads what enters layer k, decoder_upper runs k..N-1.
#pragma once

#include <openssl/evp.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "errors.hpp"

namespace autosteer {

using Json = nlohmann::json;
namespace fs = std::filesystem;

constexpr int kFormatVersion = 1;
constexpr const char* kManifestFile = "autosteer.json";

struct Dims {
  int64_t hidden_size, num_hidden_layers, num_key_value_heads, head_dim, vocab_size;
  int64_t context_length;  ///< most tokens a prompt and its answer may take together
};

struct TensorSpec {
  std::string name, dtype;  ///< dtype: numpy's name
};

struct GraphSpec {
  std::string file, sha256;
  std::vector<TensorSpec> inputs, outputs;
  std::optional<std::array<int64_t, 2>> layers;  ///< decoder halves: first layer, one past the last
};

struct DataFile {
  std::string file, sha256;
  int64_t bytes;
};

struct ImageSpec {
  int64_t tile_size;        ///< pixels; the encoder's input is (tiles, 3, tile_size, tile_size)
  int64_t tokens_per_side;  ///< image_features of one tile: tokens_per_side ** 2 rows
  std::vector<std::array<int64_t, 2>> grid_pinpoints;  ///< (height, width) in pixels
  int64_t max_tiles_side;                              ///< larger feature grids are shrunk to about this many tiles
  std::array<double, 3> mean, std;
  double rescale_factor;
  std::string resample;  ///< bicubic, bilinear, lanczos or nearest: Pillow's
};

/// One piece of a rendered prompt (see text.hpp).
struct Piece {
  std::string kind;  ///< token, literal, text or image
  std::string text;
  int64_t id = -1;
};

struct TurnSpec {
  std::vector<Piece> prefix, image, text, suffix;
};

struct PromptSpec {
  std::vector<Piece> begin;  ///< before a dialogue that has no system turn
  std::optional<TurnSpec> system;
  TurnSpec user, assistant;
  std::vector<Piece> generation;  ///< opens the answer
  bool images_first;              ///< all images of a turn come before its text
  bool strip_text;                ///< white space around a turn's text is dropped
  std::vector<int64_t> end_token_ids;
  std::string tokenizer = "tokenizer.json";
};

struct ProberSpec {
  int64_t token_offset;  ///< row of hidden_states it reads, from the end of the full prompt
  double threshold;      ///< safe = 0 <= p_unsafe <= threshold
};

struct RefusalSpec {
  double strength;
  std::string text;  ///< said instead of an answer under --policy stop
};

struct Golden {
  std::string prompt;
  std::vector<std::string> images;
  std::optional<double> threshold, p_unsafe;
  std::string action;
  std::vector<int64_t> token_ids;
};

struct Manifest {
  bool guarded;
  int split_layer;
  Dims dims;
  std::map<std::string, GraphSpec> graphs;
  std::vector<DataFile> files;
  PromptSpec prompt;
  std::optional<ImageSpec> image;
  std::optional<ProberSpec> prober;
  std::optional<RefusalSpec> refusal;
  std::vector<Golden> golden;

  /// Read and check autosteer.json of `folder`; files are checked by `verify`.
  static Manifest load(const fs::path& folder);

  /// sha256 of every file of the package, by relative path.
  std::map<std::string, std::string> paths() const;

  /// Compare every file with its hash. Throws PackageError naming the first that is missing or differs.
  void verify(const fs::path& folder) const;
};

namespace decoding {

/// A JSON value and where it stands; every `as_...` throws PackageError where the value does not fit.
class Node {
 public:
  Node(const Json& data, std::string where) : data_(data), where_(std::move(where)) {}

  [[noreturn]] void fail(const std::string& what) const { throw PackageError(where_ + ": " + what); }

  /// This object, having exactly `required` and perhaps some of `optional`.
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
    if (!data_.is_number()) misfit("float");
    return data_.get<double>();
  }

  /// Elements of an array.
  std::vector<Node> items() const {
    if (!data_.is_array()) misfit("tuple");
    std::vector<Node> nodes;
    for (size_t i = 0; i < data_.size(); ++i) nodes.emplace_back(data_[i], where_ + "[" + std::to_string(i) + "]");
    return nodes;
  }

  /// Elements of an object whose keys are free.
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

  /// Nothing where the value is null.
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
    const auto text = data_.dump(-1, ' ', false, Json::error_handler_t::replace);
    fail(text.substr(0, 60) + " does not fit (expected " + expected + ")");
  }

  const Json& data_;
  std::string where_;
};

inline std::string as_string(const Node& node) { return node.as_string(); }
inline int64_t as_int(const Node& node) { return node.as_int(); }
inline int64_t as_size(const Node& node) { return node.as_size(); }
inline double as_float(const Node& node) { return node.as_float(); }
inline std::string as_precision(const Node& node) { return node.as_one_of({"fp32", "fp16", "int8", "int4"}); }

inline Dims dims(const Node& node) {
  node.object(
      {"hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "vocab_size", "context_length"});
  return {node["hidden_size"].as_size(), node["num_hidden_layers"].as_size(), node["num_key_value_heads"].as_size(),
          node["head_dim"].as_size(),    node["vocab_size"].as_size(),        node["context_length"].as_size()};
}

inline TensorSpec tensor(const Node& node) {
  node.object({"name", "dtype", "shape"});
  const auto check_dimension = [](const Node& dimension) {
    // A number, or the name of a symbolic dimension.
    return dimension.is_string() ? static_cast<int64_t>(-1) : dimension.as_int();
  };
  node["shape"].list(check_dimension);
  return {node["name"].as_string(), node["dtype"].as_string()};
}

inline GraphSpec graph(const Node& node) {
  node.object({"file", "sha256", "inputs", "outputs", "layers", "precision"});
  as_precision(node["precision"]);
  GraphSpec spec;
  spec.file = node["file"].as_string();
  spec.sha256 = node["sha256"].as_string();
  spec.inputs = node["inputs"].list(tensor);
  spec.outputs = node["outputs"].list(tensor);
  spec.layers = node["layers"].optional([](const Node& layers) { return layers.tuple<2>(as_int); });
  return spec;
}

inline DataFile data_file(const Node& node) {
  node.object({"file", "bytes", "sha256"});
  return {node["file"].as_string(), node["sha256"].as_string(), node["bytes"].as_int()};
}

inline ImageSpec image(const Node& node) {
  node.object({"kind", "tile_size", "tokens_per_side", "grid_pinpoints", "max_tiles_side", "mean", "std",
               "rescale_factor", "resample"});
  node["kind"].as_one_of({"anyres"});
  ImageSpec spec;
  spec.tile_size = node["tile_size"].as_size();
  spec.tokens_per_side = node["tokens_per_side"].as_size();
  spec.grid_pinpoints =
      node["grid_pinpoints"].list([](const Node& pinpoint) { return pinpoint.tuple<2>(as_size); });
  spec.max_tiles_side = node["max_tiles_side"].as_size();
  spec.mean = node["mean"].tuple<3>(as_float);
  spec.std = node["std"].tuple<3>(as_float);
  spec.rescale_factor = node["rescale_factor"].as_float();
  spec.resample = node["resample"].as_one_of({"bicubic", "bilinear", "lanczos", "nearest"});
  if (spec.grid_pinpoints.empty()) node.fail("grid_pinpoints is empty");
  for (const auto& pinpoint : spec.grid_pinpoints) {
    if (pinpoint[0] % spec.tile_size || pinpoint[1] % spec.tile_size) node.fail("a pinpoint is not whole tiles");
    if (pinpoint[0] > 1 << 16 || pinpoint[1] > 1 << 16) node.fail("a pinpoint is too large");
  }
  return spec;
}

inline Piece piece(const Node& node) {
  node.object({"kind"}, {"text", "id"});
  Piece piece;
  piece.kind = node["kind"].as_one_of({"token", "literal", "text", "image"});
  if (node.has("text")) piece.text = node["text"].as_string();
  if (node.has("id")) piece.id = node["id"].as_int();
  return piece;
}

inline TurnSpec turn(const Node& node) {
  node.object({"prefix", "image", "text", "suffix"});
  return {node["prefix"].list(piece), node["image"].list(piece), node["text"].list(piece), node["suffix"].list(piece)};
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
  node.object({"token_offset", "threshold", "calibration"});
  for (const auto& [key, value] : node["calibration"].entries()) value.as_float();
  return {node["token_offset"].as_int(), node["threshold"].as_float()};
}

inline RefusalSpec refusal(const Node& node) {
  node.object({"strength", "text"}, {"formula"});
  if (node.has("formula")) node["formula"].as_string();
  return {node["strength"].as_float(), node["text"].as_string()};
}

inline Golden golden(const Node& node) {
  node.object({"prompt", "images", "threshold", "p_unsafe", "action", "token_ids"});
  return {node["prompt"].as_string(),
          node["images"].list(as_string),
          node["threshold"].optional(as_float),
          node["p_unsafe"].optional(as_float),
          node["action"].as_string(),
          node["token_ids"].list(as_int)};
}

/// Keys that only people read: checked like the others, and dropped.
inline void check_facts(const Node& node) {
  const Node source = node["source"];
  source.object({"repo", "revision", "model_type", "licence"});
  source["repo"].as_string();
  source["model_type"].as_string();
  source["revision"].optional(as_string);
  source["licence"].optional(as_string);
  as_precision(node["precision"]);
  const Node kv_cache = node["kv_cache"];
  kv_cache.object({"dtype", "layout"});
  kv_cache["layout"].as_one_of({"BNSH"});
  if (kv_cache["dtype"].as_string() != "float32") kv_cache.fail("this runtime keeps its caches in float32 only");
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
  node.object({"format_version", "source", "precision", "guarded", "split_layer", "dims", "graphs", "files", "kv_cache",
               "prompt", "image", "prober", "refusal", "golden", "validation", "versions"});
  check_facts(node);
  Manifest manifest;
  manifest.guarded = node["guarded"].as_bool();
  manifest.split_layer = static_cast<int>(node["split_layer"].as_size());
  manifest.dims = dims(node["dims"]);
  for (const auto& [name, value] : node["graphs"].entries()) manifest.graphs.emplace(name, graph(value));
  manifest.files = node["files"].list(data_file);
  manifest.prompt = prompt(node["prompt"]);
  manifest.image = node["image"].optional(image);
  manifest.prober = node["prober"].optional(prober);
  manifest.refusal = node["refusal"].optional(refusal);
  manifest.golden = node["golden"].list(golden);
  return manifest;
}

inline bool leaves_package(const std::string& file) {
  const fs::path path(file);
  const bool climbs = std::find(path.begin(), path.end(), fs::path("..")) != path.end();
  return file.empty() || path.is_absolute() || climbs || file.find('\\') != std::string::npos;
}

inline void check_consistency(const Manifest& m, const std::string& where) {
  const auto need = [&](bool condition, const std::string& what) {
    if (!condition) throw PackageError(where + ": " + what);
  };
  std::vector<std::string> graphs = {"embed_tokens", "decoder_lower", "decoder_upper", "lm_head"};
  if (m.guarded) graphs.insert(graphs.end(), {"prober", "refusal_head"});
  if (m.image) graphs.emplace_back("vision_encoder");
  for (const auto& name : graphs) {
    need(m.graphs.count(name) > 0, "graph '" + name + "' is missing; the package cannot run without it");
  }
  need(m.guarded == m.prober.has_value() && m.guarded == m.refusal.has_value(),
       "'guarded', 'prober' and 'refusal' contradict each other");
  const int64_t k = m.split_layer, n = m.dims.num_hidden_layers;
  using Layers = std::array<int64_t, 2>;
  need(0 < k && k < n, "split_layer " + std::to_string(k) + " is not between 1 and " + std::to_string(n - 1));
  need(m.graphs.at("decoder_lower").layers == Layers{0, k}, "decoder_lower must hold the layers before split_layer");
  need(m.graphs.at("decoder_upper").layers == Layers{k, n}, "decoder_upper must hold the layers from split_layer on");
  const auto paths = m.paths();
  for (const auto& [file, hash] : paths) need(!leaves_package(file), "path '" + file + "' leaves the package");
  need(paths.count(m.prompt.tokenizer) > 0, "'" + m.prompt.tokenizer + "' has no hash under 'files'");
}

}  // namespace decoding

inline Manifest Manifest::load(const fs::path& folder) {
  const fs::path path = folder / kManifestFile;
  if (std::error_code ignored; !fs::exists(path, ignored)) {
    throw PackageError(folder.string() + ": no " + kManifestFile +
                       " here; is this a folder made by autosteer-export?");
  }
  Json data;
  try {
    std::ifstream file(path, std::ios::binary);
    data = Json::parse(file);
  } catch (const Json::exception& err) {
    throw PackageError(path.string() + ": not readable as JSON (" + err.what() + ")");
  }
  const Json version = data.is_object() && data.contains("format_version") ? data["format_version"] : Json();
  if (version != kFormatVersion) {
    throw PackageError(path.string() + ": format_version " + version.dump() + ", this runtime reads " +
                       std::to_string(kFormatVersion) + "; export the model again");
  }
  Manifest manifest = decoding::manifest({data, path.string()});
  decoding::check_consistency(manifest, path.string());
  return manifest;
}

inline std::map<std::string, std::string> Manifest::paths() const {
  std::map<std::string, std::string> all;
  for (const auto& [name, spec] : graphs) all[spec.file] = spec.sha256;
  for (const auto& spec : files) all[spec.file] = spec.sha256;
  return all;
}

/// Hex digest of a file, read in 1 MiB blocks.
inline std::string sha256(const fs::path& path) {
  const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(EVP_MD_CTX_new(), EVP_MD_CTX_free);
  if (!context || EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr) != 1) throw Error("libcrypto has no SHA-256");
  std::ifstream file(path, std::ios::binary);
  std::vector<char> block(1 << 20);
  while (file.read(block.data(), static_cast<std::streamsize>(block.size())), file.gcount() > 0) {
    if (EVP_DigestUpdate(context.get(), block.data(), static_cast<size_t>(file.gcount())) != 1) {
      throw Error("libcrypto cannot hash");
    }
  }
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned int size = 0;
  if (EVP_DigestFinal_ex(context.get(), digest.data(), &size) != 1) throw Error("libcrypto cannot hash");
  std::string hex;
  for (unsigned int i = 0; i < size; ++i) {
    hex += "0123456789abcdef"[digest[i] >> 4];
    hex += "0123456789abcdef"[digest[i] & 15];
  }
  return hex;
}

inline void Manifest::verify(const fs::path& folder) const {
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
