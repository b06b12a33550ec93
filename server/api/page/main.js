// Starts the page.

import { Chat } from "./chat.js";
import { Live } from "./live.js";

const chat = new Chat();
new Live((status) => chat.update(status)).run();
