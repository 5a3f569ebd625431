// Sets the theme before the page is drawn, so that no other one flashes: the one that was chosen, else the system's.
"use strict";
{
  const system = matchMedia("(prefers-color-scheme: dark)");
  const chosen = () => {
    try {
      return localStorage.getItem("theme");
    } catch {
      return null; // storage is off
    }
  };
  const draw = () => {
    const theme = chosen();
    document.documentElement.dataset.theme = theme === "dark" || (theme !== "light" && system.matches) ? "dark" : "light";
  };
  system.addEventListener("change", draw);
  draw();
}
