// AutoSteer in C++17: the guarded loop of autosteer.runtime, from the ONNX files and the manifest alone.
//
//     autosteer::Engine engine("package/");
//     const auto answer = engine.generate({autosteer::Message::user("what is shown here?", {"photo.png"})}, {},
//                                         engine.policy(), [](const autosteer::Chunk& chunk) { std::cout << chunk.text;
//                                         });
//
// Headers only. Needs onnxruntime (1.21 or newer), nlohmann/json, Oniguruma, utf8proc, libcrypto, libpng and libjpeg;
// CMakeLists.txt beside this file finds them. docs/embedding.md explains the package and this loop.
//
//     errors.hpp    what is thrown                   text.hpp      dialogue -> token ids -> text
//     manifest.hpp  autosteer.json                   tokenizer.hpp tokenizer.json
//     gate.hpp      the safety rule                  image.hpp     picture -> pixel_values; features -> rows
//     unicode.hpp   what is a character              video.hpp     the same of a video's frames
//     subgraph.hpp  one session, buffers, caches     picture.hpp   PNG, JPEG -> pixels
//     request.hpp   one answer's buffers             speculate.hpp what is drafted
//     conversation.hpp  what turns share             digest.hpp    SHA-256
//     engine.hpp    the loop                         sampling.hpp  logits -> token
//     self_test.hpp does the gate work here?         pages.hpp     where weights lie
//     check.hpp     the golden prompts again (not included here)
//
// Other languages: autosteer.h (C functions), built as libautosteer.
#pragma once

#include "engine.hpp"
