// Runs single parts of the runtime for tests/cpp and tests/conformance, which compare them with Python's: one JSON
// command per line on stdin, one JSON answer per line on stdout. Arrays go to the file named by "out", as raw bytes.
// A command with "trace" is also answered where in the program exceptions were thrown, caught or not.
#include <dlfcn.h>
#include <execinfo.h>

#include <array>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine.hpp"
#include "json.hpp"

namespace {

std::vector<uintptr_t> thrown;  // return addresses on the stack of every throw, as addr2line counts them

}  // namespace

/// Every `throw` of this program comes through here: note where, and go on to the real one.
extern "C" [[noreturn]] void __cxa_throw(void* object, void* type, void (*destroy)(void*)) {
  std::array<void*, 16> stack{};
  const int depth = backtrace(stack.data(), stack.size());
  Dl_info program{}, frame{};
  dladdr(reinterpret_cast<void*>(__cxa_throw), &program);
  for (int i = 0; i < depth; ++i) {
    if (dladdr(stack[i], &frame) && frame.dli_fbase == program.dli_fbase) {
      thrown.push_back(reinterpret_cast<uintptr_t>(stack[i]) - reinterpret_cast<uintptr_t>(program.dli_fbase));
    }
  }
  using Throw = void (*)(void*, void*, void (*)(void*));
  reinterpret_cast<Throw>(dlsym(RTLD_NEXT, "__cxa_throw"))(object, type, destroy);
  std::abort();
}

namespace {

using autosteer::Json;

template <class T>
void write(const Json& command, const std::vector<T>& array) {
  std::ofstream file(command.at("out").get<std::string>(), std::ios::binary);
  file.write(reinterpret_cast<const char*>(array.data()), static_cast<std::streamsize>(array.size() * sizeof(T)));
}

autosteer::Rows read_rows(const std::string& path, int64_t width) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  autosteer::Rows rows{width, std::vector<float>(bytes.size() / sizeof(float))};
  std::memcpy(rows.data.data(), bytes.data(), rows.data.size() * sizeof(float));
  return rows;
}

autosteer::ImageSpec spec(const Json& command) {
  return autosteer::decoding::image({command.at("spec"), "spec"});
}

autosteer::Image picture(const Json& command) {
  return *autosteer::open_image(autosteer::fs::path(command.at("file").get<std::string>()));
}

/// {"tokenizer": file, "texts": [...]} -> [[id, ...], ...]
Json encode(const Json& command) {
  const autosteer::Tokenizer tokenizer(command.at("tokenizer").get<std::string>());
  Json ids = Json::array();
  for (const auto& text : command.at("texts")) ids.push_back(tokenizer.encode(text.get<std::string>()));
  return ids;
}

/// {"tokenizer": file, "answers": [[id, ...], ...], "stop": [text, ...]} -> [[piece, ..., what was held], ...]
Json decode(const Json& command) {
  const autosteer::Tokenizer tokenizer(command.at("tokenizer").get<std::string>());
  Json answers = Json::array();
  for (const auto& ids : command.at("answers")) {
    autosteer::Detokeniser detokeniser(tokenizer, command.at("stop").get<std::vector<std::string>>());
    Json pieces = Json::array();
    for (const auto& id : ids) {
      pieces.push_back(detokeniser.push(id.get<int64_t>()));
      if (detokeniser.stopped) break;
    }
    pieces.push_back(detokeniser.flush());
    answers.push_back(pieces);
  }
  return answers;
}

/// {"file": picture, "out": file} -> [height, width]
Json open(const Json& command) {
  const autosteer::Image image = picture(command);
  write(command, image.rgb);
  return {image.height, image.width};
}

/// {"file": picture, "height", "width", "resample", "out": file} -> null
Json resize(const Json& command) {
  write(command,
        autosteer::resize(picture(command), command.at("height"), command.at("width"), command.at("resample")).rgb);
  return nullptr;
}

/// {"file": picture, "side", "out": file} -> null
Json squeeze(const Json& command) {
  write(command, autosteer::squeeze(picture(command), command.at("side"), command.at("side")).rgb);
  return nullptr;
}

/// {"path", "frames"} -> of each frame that is chosen its file's name, or the SHA-256 of its pixels; and its seconds
Json frames(const Json& command) {
  Json chosen = Json::array();
  const auto video = autosteer::open_video(command.at("path").get<std::string>(), command.at("frames"));
  for (const auto& frame : video.frames) {
    if (const auto* decoded = std::get_if<autosteer::Pixels>(&frame)) {
      autosteer::Sha256 hash;
      hash.add((*decoded)->rgb.data(), (*decoded)->rgb.size());
      chosen.push_back(hash.hex());
    } else {
      chosen.push_back(std::get<std::filesystem::path>(frame).filename().string());
    }
  }
  return {{"chosen", chosen}, {"seconds", video.seconds}};
}

/// {"path", "seconds"} -> how many frames ffmpeg finds in so many seconds
Json count(const Json& command) {
  auto file = autosteer::ffmpeg::open_regular(command.at("path").get<std::string>());
  return autosteer::ffmpeg::VideoFile(std::move(file), command.at("seconds")).seconds().size();
}

/// {"file": picture, "spec": manifest's image, "max_tiles": number or null, "alone": bool, "out": file}
/// -> number of tiles
Json prepare(const Json& command) {
  std::optional<int64_t> most;
  if (!command.at("max_tiles").is_null()) most = command.at("max_tiles").get<int64_t>();
  const autosteer::ImageSpec fitting = autosteer::at_most(spec(command), most);
  const autosteer::Rows pixel_values = autosteer::prepare(picture(command), fitting, command.at("alone"));
  write(command, pixel_values.data);
  return pixel_values.count();
}

/// {"features": file, "newline": file, "depth", "height", "width", "spec", "out": file} -> number of rows
Json pack(const Json& command) {
  const int64_t depth = command.at("depth");
  const autosteer::Rows rows =
      autosteer::pack(read_rows(command.at("features"), depth), read_rows(command.at("newline"), depth),
                      command.at("height"), command.at("width"), spec(command));
  write(command, rows.data);
  return rows.count();
}

/// {"prompt": [id, ...], "answer": [id, ...], "position_cost", "limit", "table": null or file, "ngrams", "vocab_size"}
/// -> the draft before each token of the answer, and after the last
Json draft(const Json& command) {
  std::optional<autosteer::DraftTable> table;
  if (!command.at("table").is_null()) {
    table.emplace(command.at("table").get<std::string>(), command.at("ngrams").get<size_t>(), command.at("vocab_size"));
  }
  autosteer::Drafter drafter(command.at("prompt").get<std::vector<int64_t>>(), command.at("position_cost"),
                             table ? &*table : nullptr);
  Json drafts = {drafter.draft(command.at("limit"))};
  for (const auto& token : command.at("answer")) {
    drafter.push(token);
    drafts.push_back(drafter.draft(command.at("limit")));
  }
  return drafts;
}

/// {"versions": [text, ...]} -> [whether an onnxruntime of that version can bound spinning, ..., whether this one can]
Json spinning(const Json& command) {
  Json can = Json::array();
  for (const auto& version : command.at("versions")) {
    can.push_back(autosteer::can_bound_spinning(version.get<std::string>().c_str()));
  }
  can.push_back(autosteer::can_bound_spinning());
  return can;
}

/// {"texts": [...]} -> the pieces of each
Json cut(const Json& command) {
  Json pieces = Json::array();
  for (const auto& text : command.at("texts")) pieces.push_back(autosteer::pieces(text.get<std::string>()));
  return pieces;
}

/// {"texts": [...]} -> the texts in plain letters
Json deobfuscate(const Json& command) {
  Json plain = Json::array();
  for (const auto& text : command.at("texts")) plain.push_back(autosteer::deobfuscated(text.get<std::string>()));
  return plain;
}

Json limits(const Json& command) {
  return autosteer::cpu_limits(command.at("membership").get<std::string>(), command.at("root").get<std::string>());
}

/// A number; "nan", "inf" and "-inf", which JSON lacks, as text.
double number(const Json& value) {
  return value.is_string() ? std::stod(value.get<std::string>()) : value.get<double>();
}

/// {"p_unsafe": number, "threshold": number} -> whether that is safe
Json rule(const Json& command) {
  return autosteer::is_safe(number(command.at("p_unsafe")), number(command.at("threshold")));
}

/// {"p_unsafe": number or null, "mode", "threshold", "judge_threshold": optional, "strength"}
/// -> {"unsafe", "action", "strength", "judged_above"}
Json gate(const Json& command) {
  const Json& score = command.at("p_unsafe");
  std::optional<double> p_unsafe;
  if (!score.is_null()) p_unsafe = number(score);
  autosteer::GatePolicy policy{autosteer::mode_from(command.at("mode")), number(command.at("threshold")),
                               number(command.at("strength")), "no"};
  policy.judge_threshold = command.value("judge_threshold", 1.0);
  policy.check();
  const autosteer::Verdict verdict = autosteer::decide(p_unsafe, policy, 1);
  return {{"unsafe", verdict.unsafe},
          {"action", autosteer::name(verdict.action)},
          {"strength", verdict.strength},
          {"judged_above", verdict.judged_above()}};
}

/// {"sampling": as in autosteer.h, "logits": [[number, ...], ...], "tokens": [id, ...], "prompt_tokens"} -> [id, ...],
/// one after the other drawn from the rows of logits
Json sample(const Json& command) {
  const Json request = {{"messages", Json::array()}, {"sampling", command.at("sampling")}};
  const auto config = autosteer::RequestJson::parse(request.dump()).sampling;
  config.check();
  autosteer::Sampler sampler(config);
  Json drawn = Json::array();
  for (const Json& row : command.at("logits")) {
    std::vector<float> logits;
    for (const Json& logit : row) logits.push_back(static_cast<float>(number(logit)));
    const auto tokens = command.at("tokens").get<std::vector<int64_t>>();
    drawn.push_back(sampler(logits, tokens, command.at("prompt_tokens").get<size_t>()));
  }
  return drawn;
}

/// The engine of a command's "package", with its "options" (as in autosteer.h); on one thread unless these say
/// otherwise.
std::unique_ptr<const autosteer::Engine> engine(const Json& command) {
  auto options = autosteer::options_from_json(command.value("options", Json::object()).dump());
  if (options.threads == 0) options.threads = 1;
  return std::make_unique<const autosteer::Engine>(command.at("package").get<std::string>(), options);
}

/// {"package": folder} -> null; its manifest and the hashes of its files
Json verify(const Json& command) {
  const std::string folder = command.at("package");
  autosteer::Manifest::load(folder).verify(folder);
  return nullptr;
}

/// {"package": folder, "options"} -> null
Json load(const Json& command) {
  engine(command);
  return nullptr;
}

/// {"package": folder, "messages": as in autosteer.h} -> {"rows": [token id, or null for a picture's or a video's row,
/// ...], "probed": [[position, ...], ...]}
Json prompt(const Json& command) {
  const auto loaded = engine(command);
  autosteer::Stats stats;
  const Json request = {{"messages", command.at("messages")}};
  const auto prepared = loaded->encoder.prepare(autosteer::RequestJson::parse(request.dump()).messages, stats);
  Json rows = Json::array();
  for (const auto& [picture, id] : prepared.keys) rows.push_back(picture.empty() ? Json(id) : Json());
  return {{"rows", rows}, {"probed", prepared.probed}};
}

/// {"package": folder, "requests": [as in autosteer.h, or its text, ...], "conversation": bool, "options"}
/// -> [what autosteer-run --json prints, ...], or the error of the first that is refused
Json ask(const Json& command) {
  const auto loaded = engine(command);
  autosteer::Conversation conversation;
  autosteer::Conversation* shared = command.value("conversation", false) ? &conversation : nullptr;
  Json answers = Json::array();
  for (const Json& asked : command.at("requests")) {
    auto request = autosteer::RequestJson::parse(asked.is_string() ? asked.get<std::string>() : asked.dump());
    const auto policy = loaded->policy(request.mode, request.threshold, request.strength, request.pieces,
                                       request.judge_answers);
    const auto answer = loaded->generate(std::move(request.messages), request.sampling, policy, {}, shared);
    answers.push_back(Json(autosteer::answer_json(answer)));
  }
  return answers;
}

/// {"package": folder, "messages": as in autosteer.h, "mode"} -> p_unsafe, or null for mode "off"
Json score(const Json& command) {
  const auto loaded = engine(command);
  const Json request = {{"messages", command.at("messages")}};
  const auto messages = autosteer::RequestJson::parse(request.dump()).messages;
  const auto mode = autosteer::mode_from(command.at("mode").get<std::string>());
  return Json(autosteer::or_null(loaded->score(messages, loaded->policy(mode)).p_unsafe));
}

/// {"package": folder, "requests": [{"messages": as in autosteer.h}, ...], "conversation", "pieces", "judge_answers":
/// bool, "failing": number} -> for each request the scores of its judged turns, how often each graph encoded for it,
/// and how many turns were judged by themselves. The first of these, as many as are "failing", get no score.
Json judge(const Json& command) {
  const auto loaded = engine(command);
  std::map<std::string, int> encoded;
  int by_themselves = 0, failing = command.value("failing", 0);
  const autosteer::PromptEncoder encoder(loaded->manifest, loaded->tokenizer, {}, [&](const std::string& name) {
    ++encoded[name];
    return std::shared_ptr<const autosteer::Subgraph>(std::shared_ptr<void>(), &loaded->graphs().at(name));
  });
  const auto ask = [&](autosteer::EncodedPrompt prompt, autosteer::Stats& stats, autosteer::Conversation& before) {
    ++by_themselves;
    if (failing-- > 0) throw autosteer::InputError("it fails");
    return loaded->request(std::move(prompt), 1, stats, &before);
  };
  autosteer::Judge::ReadPacked read_packed;
  if (loaded->manifest.reads_in_packs()) {
    read_packed = [&](autosteer::CachedPrefix& begun, const auto& prompts) {
      by_themselves += static_cast<int>(prompts.size());
      return autosteer::read_packed(loaded->manifest, loaded->graphs(), loaded->log, begun, prompts);
    };
  }
  const autosteer::Judge judge(encoder, ask, read_packed, loaded->manifest.split_layer, loaded->log);
  const bool pieces = command.value("pieces", true), judge_answers = command.value("judge_answers", false);
  const autosteer::GatePolicy policy = loaded->policy(autosteer::Mode::report, {}, {}, pieces, judge_answers);
  autosteer::Conversation conversation;
  autosteer::Conversation* shared = command.value("conversation", false) ? &conversation : nullptr;
  Json judged = Json::array();
  for (const Json& asked : command.at("requests")) {
    const auto messages = autosteer::RequestJson::parse(asked.dump()).messages;
    autosteer::Stats stats;
    autosteer::Record record = loaded->record(policy, messages, stats);
    encoded.clear();
    by_themselves = 0;
    autosteer::EncodedPrompt prompt = encoder.prepare(messages, stats, shared);
    record.seen = prompt.seen;
    autosteer::Request request = loaded->request(std::move(prompt), 1, stats);
    judge.prompt(request, record, policy, shared);
    judged.push_back({{"scores", record.scores}, {"encoded", encoded}, {"by_themselves", by_themselves}});
  }
  return judged;
}

/// {"package": folder} -> null; asks one conversation with two engines
Json share(const Json& command) {
  autosteer::EngineOptions options;
  options.threads = 1;
  const std::string package = command.at("package");
  const autosteer::Engine one(package, options), other(package, options);
  autosteer::Conversation conversation;
  for (const autosteer::Engine* engine : {&one, &one, &other}) {
    engine->generate({autosteer::Message::user("red")}, {}, engine->policy(), {}, &conversation);
  }
  return nullptr;
}

}  // namespace

int main() {
  const std::map<std::string, Json (*)(const Json&)> parts = {
      {"ask", ask}, {"count", count}, {"cut", cut}, {"decode", decode}, {"deobfuscate", deobfuscate}, {"draft", draft},
      {"encode", encode}, {"frames", frames}, {"gate", gate}, {"judge", judge}, {"limits", limits}, {"load", load},
      {"open", open}, {"pack", pack}, {"prepare", prepare}, {"prompt", prompt}, {"resize", resize}, {"rule", rule},
      {"sample", sample}, {"score", score}, {"share", share}, {"spinning", spinning}, {"squeeze", squeeze},
      {"verify", verify}};
  for (std::string line; std::getline(std::cin, line);) {
    Json said;
    bool trace = false;
    thrown.clear();
    try {
      const Json command = Json::parse(line);
      trace = command.value("trace", false);
      said = {{"answer", parts.at(command.at("part"))(command)}};
    } catch (const autosteer::Error& err) {
      said = {{"error", err.what()}, {"exit_code", err.exit_code}};
    } catch (const std::exception& err) {
      said = {{"error", err.what()}, {"exit_code", 1}};
    }
    if (trace) said["thrown"] = thrown;
    std::cout << said.dump(-1, ' ', false, Json::error_handler_t::replace) << std::endl;
  }
  return 0;
}
