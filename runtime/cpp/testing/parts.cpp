// Runs single parts of the runtime for tests/test_cpp_*.py, which compare them with Python's: one JSON command per line
// on stdin, one JSON answer per line on stdout. Arrays go to the file named by "out", as raw bytes.
#include <fstream>
#include <iostream>
#include <map>
#include <string>
#include <vector>

#include "../autosteer.hpp"
#include "../json.hpp"

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
  return autosteer::open_image(autosteer::fs::path(command.at("file").get<std::string>()));
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
  write(command, autosteer::squeeze(picture(command), command.at("side")).rgb);
  return nullptr;
}

/// {"folder", "frames"} -> the names of the frames that are chosen
Json frames(const Json& command) {
  Json names = Json::array();
  for (const auto& frame : autosteer::open_video(command.at("folder").get<std::string>(), command.at("frames"))) {
    names.push_back(std::get<std::filesystem::path>(frame).filename().string());
  }
  return names;
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

/// {"prompt": [id, ...], "answer": [id, ...], "row_cost", "limit"} -> what is drafted before each token of the answer,
/// and behind it
Json draft(const Json& command) {
  autosteer::Drafter drafter(command.at("prompt").get<std::vector<int64_t>>(), command.at("row_cost"));
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

/// {"p_unsafe": number, "nan" or null, "mode", "threshold"} -> [unsafe, action]
Json gate(const Json& command) {
  const Json& score = command.at("p_unsafe");
  std::optional<double> p_unsafe;
  if (!score.is_null()) p_unsafe = score.is_string() ? std::stod(score.get<std::string>()) : score.get<double>();
  const autosteer::GatePolicy policy{autosteer::mode_from(command.at("mode")), command.at("threshold"), 0.1, "no"};
  const autosteer::Verdict verdict = autosteer::decide(p_unsafe, policy, 1);
  return {verdict.unsafe, autosteer::name(verdict.action)};
}

/// {"package": folder, "request": as in autosteer.h} -> what autosteer-run --json prints
Json answer(const Json& command) {
  autosteer::EngineOptions options;
  options.threads = 1;
  const autosteer::Engine engine(command.at("package").get<std::string>(), options);
  auto request = autosteer::RequestJson::parse(command.at("request").dump());
  const auto policy = engine.policy(request.mode, request.threshold, request.strength);
  return autosteer::answer_json(engine.generate(std::move(request.messages), request.sampling, policy));
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
      {"answer", answer},   {"encode", encode},     {"decode", decode}, {"open", open},     {"resize", resize},
      {"prepare", prepare}, {"pack", pack},         {"gate", gate},     {"frames", frames}, {"squeeze", squeeze},
      {"draft", draft},     {"spinning", spinning}, {"share", share}};
  for (std::string line; std::getline(std::cin, line);) {
    try {
      const Json command = Json::parse(line);
      std::cout << Json{{"answer", parts.at(command.at("part"))(command)}}.dump() << std::endl;
    } catch (const autosteer::Error& err) {
      std::cout << Json{{"error", err.what()}, {"exit_code", err.exit_code}}.dump() << std::endl;
    } catch (const std::exception& err) {
      std::cout << Json{{"error", err.what()}, {"exit_code", 1}}.dump() << std::endl;
    }
  }
  return 0;
}
