def plan_page(data): return ""
