// Lists of elements that follow lists of items.

/**
 * Return a function that makes the children of an element those of a list of items. An item that was there before keeps
 * its element, with the focus and what is selected in it.
 *
 * @param {Element} parent has no other children.
 * @param {function} keyOf returns the key of an item: a text that is different for each.
 * @param {function} make makes the element of an item: returns `{ element, update(item) }`.
 */
export function keyed(parent, keyOf, make) {
  const shown = new Map();
  return (items) => {
    const keys = new Set(items.map(keyOf));
    for (const [key, each] of shown) {
      if (keys.has(key)) continue;
      each.element.remove();
      shown.delete(key);
    }
    let before = null;
    for (const item of items) {
      const key = keyOf(item);
      let each = shown.get(key);
      if (each === undefined) shown.set(key, (each = make(item)));
      each.update(item);
      // Only what is new or out of its order is moved: moving takes the focus away.
      const place = before === null ? parent.firstChild : before.nextSibling;
      if (each.element !== place) parent.insertBefore(each.element, place);
      before = each.element;
    }
  };
}
