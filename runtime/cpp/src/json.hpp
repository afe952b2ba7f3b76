// Answers to JSON, with the keys of `autosteer-run --json`, and requests from JSON. Used by autosteer-cli and the C
// functions. NaN becomes null, as in Python.
#pragma once

#include <algorithm>
#include <exception>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine.hpp"

namespace autosteer {

inline OrderedJson timings_json(const Stats& stats) {
  return {{"prompt_tokens", stats.prompt_tokens},
          {"reused_tokens", stats.reused_tokens},
          {"completion_tokens", stats.completion_tokens},
          {"drafted_tokens", stats.drafted_tokens},
          {"accepted_tokens", stats.accepted_tokens},
          {"image_tiles", stats.image_tiles},
          {"kv_bytes", stats.kv_bytes},
          {"vision_ms", stats.vision_ms},
          {"embed_ms", stats.embed_ms},
          {"lower_ms", stats.lower_ms},
          {"gate_ms", stats.gate_ms},
          {"upper_ms", or_null(stats.upper_ms)},
          {"ttft_ms", stats.ttft_ms},
          {"decode_ms", stats.decode_ms},
          {"monitor_ms", stats.monitor_ms},
          {"decode_tok_s", or_null(stats.decode_tok_s())}};
}

inline OrderedJson answer_json(const Answer& answer) {
  return {{"text", answer.text},
          {"token_ids", answer.token_ids},
          {"finish_reason", answer.finish_reason},
          {"verdict", verdict_json(answer.verdict)},
          {"device", answer.stats.device},
          {"timings", timings_json(answer.stats)}};
}

inline OrderedJson chunk_json(const Chunk& chunk) {
  OrderedJson json = {{"text", chunk.text},
                      {"token", or_null(chunk.token)},
                      {"verdict", verdict_json(chunk.verdict)},
                      {"finish_reason", chunk.finish_reason.empty() ? OrderedJson() : OrderedJson(chunk.finish_reason)},
                      {"device", nullptr},
                      {"timings", nullptr}};
  if (chunk.stats) {
    json["device"] = chunk.stats->device;
    json["timings"] = timings_json(*chunk.stats);
  }
  return json;
}

/// Parse a JSON text and `decode` it. Throws InputError for anything that does not fit.
template <class Decode>
auto from_json(const std::string& text, const std::string& what, const Decode& decode) {
  Json data;
  try {
    data = decoding::parse_strictly(text);
  } catch (const Json::parse_error& err) {  // its message would quote the text's bytes
    throw InputError(what + ": not readable as JSON (at byte " + std::to_string(err.byte) + ")");
  } catch (const std::exception& err) {
    throw InputError(what + ": not readable as JSON (" + err.what() + ")");
  }
  try {
    return decode(decoding::Node{data, what});
  } catch (const PackageError& err) {
    throw InputError(err.what());
  }
}

/// The name of a file: not empty, and without the zero byte that would cut it short.
inline std::string file_name(const decoding::Node& node) {
  std::string name = node.as_string();
  if (name.empty() || name.find('\0') != std::string::npos) node.fail("expected the name of a file");
  return name;
}

/// Options of the C interface; autosteer.h describes them.
inline EngineOptions options_from_json(const std::string& text) {
  return from_json(text, "options", [](const decoding::Node& node) {
    node.object({}, {"threads", "max_tiles", "low_memory", "files", "policy", "judge_answers", "advise_pages",
                     "onnxruntime", "audit", "audit_texts"});
    EngineOptions options;
    if (node.has("threads")) options.threads = node["threads"].as_int();
    if (node.has("max_tiles")) options.max_tiles = node["max_tiles"].optional(decoding::as_int);
    if (node.has("low_memory")) options.low_memory = node["low_memory"].as_bool();
    if (node.has("files")) options.files = node["files"].as_bool();
    if (node.has("policy")) options.policy = mode_from(node["policy"].as_string());
    if (node.has("judge_answers")) options.judge_answers = node["judge_answers"].as_bool();
    if (node.has("advise_pages")) options.advise_pages = node["advise_pages"].as_bool();
    if (node.has("onnxruntime")) options.onnxruntime = node["onnxruntime"].as_string();
    if (node.has("audit")) options.audit = file_name(node["audit"]);
    if (node.has("audit_texts")) options.audit_texts = node["audit_texts"].as_bool();
    return options;
  });
}

/// A request of the C interface; autosteer.h describes it.
struct RequestJson {
  std::vector<Message> messages;
  SamplingConfig sampling;
  Mode mode = Mode::steer;
  std::optional<double> threshold, strength;
  bool pieces = true;
  std::optional<bool> judge_answers;
  bool changes_gate = false;  ///< it has a key of the gate, or a trusted message

  /// Throws InputError for anything that does not fit, and for unknown keys: a mistyped "policy" must not be ignored.
  static RequestJson parse(const std::string& text) { return from_json(text, "request", decode); }

 private:
  static RequestJson decode(const decoding::Node& node) {
    using decoding::as_float;
    node.object({"messages"}, {"policy", "threshold", "strength", "pieces", "judge_answers", "sampling"});
    RequestJson request;
    request.messages = node["messages"].list(message);
    if (node.has("policy")) request.mode = mode_from(node["policy"].as_string());
    if (node.has("threshold")) request.threshold = node["threshold"].optional(as_float);
    if (node.has("strength")) request.strength = node["strength"].optional(as_float);
    if (node.has("pieces")) request.pieces = node["pieces"].as_bool();
    if (node.has("judge_answers")) request.judge_answers = node["judge_answers"].as_bool();
    request.changes_gate =
        node.has("policy") || node.has("threshold") || node.has("strength") || node.has("pieces") ||
        node.has("judge_answers") ||
        std::any_of(request.messages.begin(), request.messages.end(), [](const Message& m) { return m.trusted; });
    if (!node.has("sampling")) return request;
    const decoding::Node wishes = node["sampling"];
    wishes.object({}, {"max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
                       "frequency_penalty", "logit_bias", "seed", "stop", "speculate"});
    SamplingConfig& sampling = request.sampling;
    if (wishes.has("max_tokens")) sampling.max_tokens = wishes["max_tokens"].as_int();
    if (wishes.has("temperature")) sampling.temperature = wishes["temperature"].as_float();
    if (wishes.has("top_k")) sampling.top_k = wishes["top_k"].as_int();
    if (wishes.has("top_p")) sampling.top_p = wishes["top_p"].as_float();
    if (wishes.has("repetition_penalty")) sampling.repetition_penalty = wishes["repetition_penalty"].as_float();
    if (wishes.has("min_p")) sampling.min_p = wishes["min_p"].as_float();
    if (wishes.has("presence_penalty")) sampling.presence_penalty = wishes["presence_penalty"].as_float();
    if (wishes.has("frequency_penalty")) sampling.frequency_penalty = wishes["frequency_penalty"].as_float();
    if (wishes.has("logit_bias")) sampling.logit_bias = bias(wishes["logit_bias"]);
    if (wishes.has("seed")) sampling.seed = wishes["seed"].as_int();
    if (wishes.has("stop")) sampling.stop = wishes["stop"].list(decoding::as_string);
    if (wishes.has("speculate")) sampling.speculate = wishes["speculate"].as_bool();
    return request;
  }

  /// {"token id": bias, ...}
  static std::map<int64_t, double> bias(const decoding::Node& node) {
    constexpr size_t kDigits = 18;  // of the largest id that is read
    std::map<int64_t, double> biases;
    for (const auto& [token, value] : node.entries()) {
      const bool digits = std::all_of(token.begin(), token.end(), is_digit);
      const bool once = token.size() == 1 || token.substr(0, 1) != "0";  // "1" and "01" would be one token
      if (token.empty() || token.size() > kDigits || !digits || !once) node.fail("'" + token + "' is no token id");
      biases[std::stoll(token)] = value.as_float();
    }
    return biases;
  }

  static Message message(const decoding::Node& node) {
    node.object({"role", "parts"}, {"trusted"});
    return {node["role"].as_string(), node["parts"].list(part), node.has("trusted") && node["trusted"].as_bool()};
  }

  static Part part(const decoding::Node& node) {
    if (node.is_string()) return node.as_string();
    node.object({}, {"image", "video", "seconds"});
    if (node.has("image") == node.has("video")) node.fail("expected one of 'image' and 'video'");
    const auto file = [](const decoding::Node& name) { return ImageLike(fs::path(file_name(name))); };
    if (node.has("image") && node.has("seconds")) node.fail("'seconds' are those of a video's frames");
    if (node.has("image")) return file(node["image"]);
    VideoPart video{node["video"].list(file)};
    if (node.has("seconds")) video.seconds = node["seconds"].list(decoding::as_float);
    return video;
  }
};

}  // namespace autosteer
