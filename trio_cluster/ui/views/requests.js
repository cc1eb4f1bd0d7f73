import { empty } from "../dom.js";

export function mount(root, page) {
  root.append(empty("Nothing here yet"));
}
