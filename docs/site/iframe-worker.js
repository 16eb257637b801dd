// Search runs in a worker, but browsers start no worker for a page opened from disk. This runs the worker's script in
// a frame instead. (The theme's search looks for this name; its own shim would come from the network.)
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      const start = () => {
        this.frame = document.createElement("iframe");
        this.frame.hidden = true;
        document.body.append(this.frame);
        const inside = this.frame.contentWindow;
        const load = (source) =>
          new Promise((loaded, failed) => {
            const script = inside.document.createElement("script");
            Object.assign(script, { src: source, onload: loaded, onerror: failed });
            inside.document.body.append(script);
          });
        inside.importScripts = (...sources) => sources.reduce((before, one) => before.then(() => load(one)), Promise.resolve());
        inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
        load(url).then(() => {
          this.inside = inside;
          this.waiting.forEach((data) => this.postMessage(data));
        });
      };
      document.body ? start() : addEventListener("DOMContentLoaded", start);
    }
    postMessage(data) {
      if (this.inside) this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data }));
      else this.waiting.push(data);
    }
    terminate() {
      this.frame?.remove();
    }
  };
  window.Worker = window.IFrameWorker;
}
